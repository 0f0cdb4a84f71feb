"""A second user on the machine, who plants things wherever he may write, and swaps what lies there.

As root the attacker is another user; else what he plants is ours, and open to everyone.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.core.cache import Stage, StageCache, atomic_folder
from pipeline.core.errors import AccessError, PipelineError
from pipeline.core.ownership import make_own, open_to_others, require_unshared
from pipeline.core.workfolder import _boot
from pipeline.formats.trtllm.convert import _new_folder
from pipeline.new import place as write_recipe
from pipeline.outcome import failure_of, open_run
from pipeline.registry.client.pull import PullRequest
from pipeline.registry.client.verify import open_target
from pipeline.registry.stores import open_store
from pipeline.registry.trust.policy import load_policy
from pipeline.registry.trust.signing import generate_key, write_key_pair
from pipeline.sources.weights import cached_files, weights_root
from tests.hostile.world import hostile_cases
from tests.registry.client.conftest import Shop

ROOT = os.geteuid() == 0
CLEAN = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
ATTACKER, BYSTANDER = (65534, 65533) if ROOT else (os.geteuid(), os.geteuid())
_STAGE = Stage(name="s", version=1, code=())


def as_attacker(act: Callable[[], object]) -> int:
    """Start what the attacker does in a process of his; its id."""
    if (pid := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            os.umask(0)
            if ROOT:
                os.setgroups([])
                os.setgid(ATTACKER)
                os.setuid(ATTACKER)
            act()
        os._exit(0)
    return pid


def snapshot(*folders: Path) -> dict[str, object]:
    """All that could be changed below some folders, which we do not own."""
    found: dict[str, object] = {}
    for path in (one for folder in folders for one in (folder, *folder.rglob("*"))):
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = path.readlink()
        elif path.is_dir():
            content = sorted(one.name for one in path.iterdir())
        found[str(path)] = (status.st_mode, status.st_uid, status.st_gid, content)
    return found


class Machine:
    """A folder of ours, a bystander's, the attacker's, and one that they share."""

    def __init__(self, root: Path, patched: pytest.MonkeyPatch) -> None:
        root.chmod(0o755)
        self.root, self.own, self.aside = root, root / "own", root / "bystander"
        self.theirs, self.shared = root / "theirs", root / "shared"
        for folder, owner in ((self.aside, BYSTANDER), (self.theirs, ATTACKER)):
            (folder / "below").mkdir(parents=True)
            for name in ("policy.yaml", "below/manifest.json", "run.log"):
                (folder / name).write_text("mine")
            for path in (folder, *folder.rglob("*")):
                os.chown(path, owner, owner)
        self.shared.mkdir()
        self.own.mkdir(mode=0o700)
        self.patched = patched
        patched.setenv("ENGINESMITH_CACHE", str(self.own / "cache"))
        self.shop = Shop(store=open_store(str(self.own / "registry")), home=self.own)
        self.shop.publish()
        self.policy = self.shop.policy()

    # Each does what a command does where `at` leads, and gives what must be ours alone then.

    def pull(self, at: Path) -> Path:
        return self.shop.pull(to=at / "tiny", policy=self.policy).dir

    def pull_through_a_cache(self, at: Path) -> Path:
        self.patched.setenv("ENGINESMITH_CACHE", str(at / "cache"))
        goal = self.own / f"goal-{os.urandom(4).hex()}"
        self.shop.pull(to=goal, through_cache=True, policy=self.policy)
        return at / "cache"

    def build(self, at: Path) -> Path:
        cache = StageCache(root=at / "cache")

        def produce(out: Path) -> None:
            (out / "result").write_text("honest")

        made = cache.run(_STAGE, {}, produce)
        assert (made.dir / "result").read_text() == "honest"
        return at / "cache"

    def fetch(self, at: Path) -> Path:
        self.patched.setenv("ENGINESMITH_CACHE", str(at / "cache"))
        folder = weights_root() / "tiny"

        def make() -> tuple[()]:
            with atomic_folder(folder) as private:
                (private / "config.json").write_text("{}")
            return ()

        cached_files(folder, make)
        return folder

    def export(self, at: Path) -> Path:
        with atomic_folder(_new_folder(at / "out"), "OUT_DIR") as private:
            (private / "rank0.safetensors").write_text("honest")
        return at / "out"

    def keygen(self, at: Path) -> Path:
        write_key_pair(generate_key(), at / "keys" / "ci.key")
        return at / "keys"

    def trust(self, at: Path) -> None:
        path = at / "policy.yaml"
        if not os.path.lexists(path):
            shutil.copy(self.policy, path)
        load_policy(path)
        require_unshared(path, "another path")

    def report(self, at: Path) -> Path:
        run_dir = open_run(at / "artifacts")
        (run_dir / "build.log").write_text("honest")
        return run_dir

    def race(self, at: Path) -> Path:
        make_own(at / "out", "--out", 0o755, team=True)
        (at / "out" / "report.json").write_text("honest")
        return at / "out"

    def new(self, at: Path) -> Path:
        write_recipe({Path("recipes/mine.yaml"): "honest"}, at)
        return at / "recipes"

    def publish(self, at: Path) -> None:
        store = open_store(str(at / "artifacts"))
        with tempfile.TemporaryDirectory(dir=self.own) as home:
            Shop(store=store, home=Path(home)).publish()
        store.leftovers(0.0, delete=True)


COMMANDS = {
    "pull": ("tiny", f".tiny.pulling-{_boot()}-0123456789abcdef", "tiny/engine"),
    "pull_through_a_cache": ("cache", "cache/packages", "cache/packages/tiny", "cache/locks"),
    "build": ("cache", "cache/stages", "cache/stages/s", "cache/locks"),
    "fetch": ("cache", "cache/weights", "cache/weights/tiny", "cache/locks"),
    "export": ("out", "out/rank0.safetensors"),
    "keygen": ("keys", "keys/ci.key", "keys/ci.key.pub"),
    "trust": ("policy.yaml",),
    "report": ("artifacts", "artifacts/.runs", "artifacts/.runs/latest"),
    "race": ("out", "out/report.json"),
    "new": ("recipes", "recipes/mine.yaml"),
    "publish": ("artifacts", "artifacts/.staging", "artifacts/tiny", "artifacts/.staging/old"),
}
"""What a command is, and where the attacker awaits it."""
TEAM = {"report", "race", "new", "publish"}
"""What may go where another user was asked to share."""


def plant(dice: random.Random, machine: Machine, path: Path) -> str:
    """Let the attacker put something at a path."""
    kinds: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "a folder": lambda: path.mkdir(0o777),
        "a full folder": lambda: shutil.copytree(machine.theirs, path),
        "a file": lambda: path.write_text("theirs"),
        "a FIFO": lambda: os.mkfifo(path, 0o666),
        "a hard link": lambda: os.link(machine.theirs / "policy.yaml", path),
    }
    if ROOT:  # a link of our own is followed
        kinds["a private folder"] = lambda: (path / "package").mkdir(0o777, parents=True)
        kinds["a link to a folder"] = lambda: path.symlink_to(machine.aside)
        kinds["a link to a file"] = lambda: path.symlink_to(machine.aside / "run.log")
        kinds["a link to nothing"] = lambda: path.symlink_to(machine.aside / "new")
    kind = dice.choice(list(kinds))

    def act() -> None:
        path.parent.mkdir(0o777, parents=True, exist_ok=True)
        kinds[kind]()
        if kind == "a private folder":
            path.chmod(0o700)
        elif not ROOT and kind != "nothing":
            path.chmod(0o777)
        os.utime(path, (0, 0), follow_symlinks=False)

    os.waitpid(as_attacker(act), 0)
    return kind


def swap(folder: Path, goal: Path) -> None:
    """Put links in place of all that appears in a folder, for as long as the command runs."""
    while True:
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                if not path.is_symlink():
                    path.rename(folder / f".aside-{os.urandom(8).hex()}")
                    path.symlink_to(goal)


def choose_place(dice: random.Random, machine: Machine, command: str) -> tuple[str, Path]:
    """Where a command is sent to."""
    kinds = ["open", "own link", "sticky", "below open", "theirs", "link"]
    shared, kind = machine.shared, dice.choice(kinds)
    shared.chmod(0o1777 if kind in {"sticky", "link"} else 0o777)
    if kind == "below open":
        (shared / "below").mkdir(mode=0o700)
        return kind, shared / "below"
    if kind == "own link":
        (machine.own / "via").symlink_to(shared)
        return kind, machine.own / "via"
    if kind == "theirs" and ROOT and command not in TEAM:
        return kind, machine.theirs
    if kind == "link" and ROOT:
        os.waitpid(as_attacker(lambda: (shared / "here").symlink_to(machine.aside)), 0)
        return kind, shared / "here"
    return "sticky" if kind == "link" else "open" if kind == "theirs" else kind, shared


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Below a folder that every user can reach; a case that hangs is stopped."""

    def stop(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    handler, umask = signal.signal(signal.SIGALRM, stop), os.umask(0o022)
    signal.alarm(60)
    with tempfile.TemporaryDirectory() as folder:
        yield Machine(Path(folder), monkeypatch)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    os.umask(umask)


@pytest.mark.parametrize("seed", hostile_cases(33))
def test_what_another_user_plants_or_swaps_is_neither_used_nor_touched(
    seed: int, machine: Machine
) -> None:
    dice, command = random.Random(seed), list(COMMANDS)[seed % len(COMMANDS)]
    kind, at = choose_place(dice, machine, command)
    target = at / dice.choice(COMMANDS[command])
    planted = plant(dice, machine, target)
    told = f"{command} in {kind} with {planted} at {target}"
    swapper = kind == "open" and dice.random() < 0.5
    seen = (machine.aside, machine.theirs, *([] if swapper else [target]))
    seen = tuple(one for one in seen if os.path.lexists(one))
    before = snapshot(*seen)
    os.umask(dice.choice([0o002 if command in TEAM else 0, 0o022]))  # as `enginesmith` has it
    pid = as_attacker(lambda: swap(machine.shared, machine.aside)) if swapper else 0
    try:
        made = getattr(machine, command)(at)
    except (PipelineError, OSError) as error:
        message = failure_of(error).message
        assert "bug in enginesmith" not in message, f"{told}: {message}"
        free = kind == "sticky" and planted == "nothing" and target.parent == at
        assert not free, f"{told}: {message}"
    else:
        assert made is None or open_to_others(made) == "", told
        assert kind == "sticky" or (kind == "theirs" and command in TEAM), told
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.umask(0o022)
    assert snapshot(*seen) == before, told
    clean = machine.own / "clean"
    clean.mkdir()
    getattr(machine, command)(clean)


def test_a_package_that_another_user_can_change_is_not_loaded(machine: Machine) -> None:
    shop = machine.shop
    pulled = shop.pull().dir
    of_team = PullRequest(
        reference="tiny", registry=shop.store.url, policy=shop.policy(), environ={}
    )
    where = open_target(of_team, to_load=True)[1].dir
    assert where.is_relative_to(machine.own / "registry")
    where.chmod(0o777)
    copied = open_target(of_team, to_load=True)[1].dir
    assert copied.is_relative_to(machine.own / "cache")
    assert open_to_others(copied) == ""
    (pulled / "engine").chmod(0o777)
    folder = PullRequest(reference=str(pulled), policy=shop.policy(), environ={})
    with pytest.raises(AccessError, match="engine is writable by everyone"):
        open_target(folder, to_load=True)
    assert shop.verify(pulled).dir == pulled


def test_what_a_command_writes_is_not_for_everyone_whatever_the_umask(machine: Machine) -> None:
    at, words = machine.own, [sys.executable, "-m", "pipeline.cli"]
    for more in (["keygen", "--out", "ci.key"], ["policy", "ci.key.pub", "--out", "policy.yaml"]):
        subprocess.run([*words, *more], cwd=at, env=CLEAN, check=True, umask=0)
    assert len(load_policy(at / "policy.yaml").keys) == 1
