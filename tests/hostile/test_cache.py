"""A disk that rots: whatever is kept changes, and what is used has the honest bytes or none."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.cache import RECORD, Stage, StageCache, require_files
from pipeline.core.errors import PipelineError
from pipeline.core.workfolder import remove_folder
from pipeline.outcome import failure_of
from pipeline.registry.client.pull import PullRequest, run
from pipeline.registry.client.verify import open_target
from pipeline.registry.inventory import entries
from pipeline.registry.trust.verification import Terms
from pipeline.sources.hub import HubSource
from pipeline.sources.text.hub import HubText
from tests.hostile.world import hostile_cases
from tests.registry.client.conftest import Shop, engine_files, noise, shop
from tests.registry.client.faulty_store import FaultyStore
from tests.sources.hub_server import COMMIT, REPO, HubServer
from tests.sources.tiny_model import tiny_repository
from tests.tiny_recipe import QUICK, Workplace

__all__ = ["shop"]
_STAGE = Stage(name="s", version=1, code=())
_TEXT = "texts/answers.txt"
_KEY = "b" * 64


@pytest.fixture(autouse=True)
def _no_case_hangs() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def hubs() -> Iterator[Mapping[str, str]]:
    """Endpoints of a Hub with a model, and of one with a text."""
    texts = {_TEXT: noise(5000).hex().encode()}
    with HubServer() as model, HubServer(files=texts, kind="dataset") as text:
        yield {"weights": model.endpoint, "text": text.endpoint}


def _files(folder: Path, *less: str) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in less)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def _stage(shop: Shop, cache: Path) -> Any:
    def produce(out: Path) -> None:
        (out / "below").mkdir()
        for number in range(4):
            (out / f"below/{number}").write_bytes(noise(3000, seed=number))

    return _files(StageCache(root=cache).run(_STAGE, {}, produce).dir, RECORD)


def _graph(shop: Shop, cache: Path) -> Any:
    stages = StageCache(root=cache)
    if stages.cpu_graph(_KEY) is None:
        _stage(shop, cache)
        (made,) = (cache / "stages" / "s").iterdir()
        stages.keep_cpu_graph(_KEY, made)
    found = stages.cpu_graph(_KEY)
    assert found is not None
    return _files(found, RECORD)


def _weights(shop: Shop, cache: Path) -> Any:
    weights = HubSource(repo_id=REPO, revision=COMMIT, licence="MIT").fetch()
    for name, data in tiny_repository().items():  # the tensors are digested by who reads them
        if (weights.dir / name).is_file() and not name.endswith(".safetensors"):
            assert (weights.dir / name).read_bytes() == data
    require_files(weights.dir, weights.files)
    return _files(weights.dir)


def _text(shop: Shop, cache: Path) -> Any:
    return HubText(repo_id=REPO, revision=COMMIT, file=_TEXT).documents()


def _pull(shop: Shop, cache: Path, **more: Any) -> Any:
    (folder,) = Path(shop.store.url).glob("tiny/*/*/manifest.json")
    goal = shop.home / f"goal-{os.urandom(4).hex()}"
    where = {"to": goal, "registry": shop.store.url, "through_cache": True}
    run(shop.request(f"tiny:{folder.parent.name}", **{**where, **more}))
    return engine_files(goal)


def _offline(shop: Shop, cache: Path) -> Any:
    if not (cache / "packages").exists():
        _pull(shop, cache)
    return _pull(shop, cache, registry=str(cache / "packages"))


def _list(shop: Shop, cache: Path) -> Any:
    remote: Any = FaultyStore(store=shop.store, local=False)
    return entries(remote, Terms(policy=shop.team.policy))


def _load(shop: Shop, cache: Path) -> Any:
    """A folder that `generate` loads."""
    if not shop.to.exists():
        shop.pull()
    wanted = PullRequest(reference=str(shop.to), policy=shop.policy(), environ={})
    return engine_files(open_target(wanted, to_load=True)[1].dir)


_USES = (_stage, _graph, _weights, _text, _pull, _offline, _list, _load)


def _rot(dice: random.Random, root: Path) -> str:
    """Change one thing below a folder; says what."""
    path = dice.choice(sorted(root.rglob("*")))
    if path.parent.is_dir():
        path.parent.chmod(0o755)
    data = path.read_bytes() if path.is_file() else b""
    at = dice.randrange(len(data) + 1)
    inverted = bytes(byte ^ 255 for byte in data[at : at + 64])
    others = [one for one in sorted(root.rglob("*")) if one.is_file()]
    contents: dict[str, Callable[[], object]] = {
        "bit": lambda: data[:at] + bytes(b ^ 1 << dice.randrange(8) for b in data[at : at + 1])
        + data[at + 1 :],
        "inverted": lambda: data[:at] + inverted + data[at + 64 :],
        "cut": lambda: data[:at],
        "longer": lambda: data + b"\n",
        "zeros": lambda: bytes(len(data)),
        "swapped": lambda: dice.choice(others).read_bytes() if others else b"",
    }  # fmt: skip
    shapes: dict[str, Callable[[], object]] = {
        "gone": lambda: None,
        "a folder": lambda: path.mkdir(),
        "a FIFO": lambda: os.mkfifo(path),
        "a link": lambda: path.symlink_to(root.with_name("aside") / path.name),
        "a file": lambda: path.write_bytes(b"rotten"),
    }
    change = dice.choice([*contents, *shapes] if data else list(shapes))
    if change in contents:
        new = contents[change]()
        path.chmod(0o644)
        path.write_bytes(new)  # type: ignore[arg-type]
    else:
        root.with_name("aside").mkdir(exist_ok=True)
        remove_folder(root.with_name("aside") / path.name)
        shutil.move(path, root.with_name("aside") / path.name)
        shapes[change]()
    return f"{path.relative_to(root)}: {change}"


@pytest.mark.parametrize("seed", hostile_cases(24))
def test_what_rotted_is_made_again_or_refused_and_never_used(
    seed: int,
    shop: Shop,
    hubs: Mapping[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dice, use, cache = random.Random(seed), _USES[seed % len(_USES)], tmp_path / "cache"
    monkeypatch.setenv("HF_ENDPOINT", hubs["text" if use is _text else "weights"])
    shop.publish()
    honest, kept = use(shop, cache), shop.to if use is _load else cache
    assert honest
    rots = [_rot(dice, kept) for _ in range(dice.randint(1, 3))]
    told = f"{use.__name__} after {rots}"
    for _ in range(2):
        try:
            assert use(shop, cache) == honest, told
        except (PipelineError, OSError) as error:
            message = failure_of(error).message
            assert "bug in enginesmith" not in message, f"{told}: {message}"
    if use is not _list:
        remove_folder(kept)  # as what refused it says
    assert use(shop, cache) == honest, told


@pytest.mark.slow
@pytest.mark.parametrize("seed", hostile_cases(3)[:30])
def test_a_build_publishes_the_honest_package_from_a_cache_that_rotted(
    seed: int, built_checkpoint: Workplace, tmp_path: Path
) -> None:
    place, dice = built_checkpoint.copy(tmp_path / "place"), random.Random(seed)
    honest = {one.name: _files(one) for one in place.packages()}
    rots = [_rot(dice, place.cache / "stages") for _ in range(dice.randint(1, 4))]
    done = place.build(*QUICK, "--rebuild")
    if done.returncode == 1 and "File exists; change its owner, or remove it" in done.stderr:
        remove_folder(place.cache / "stages")  # a file lies where a folder of ours belongs
        done = place.build(*QUICK, "--rebuild")
    assert done.returncode == 0, f"{rots}: {done.stderr}"
    assert {one.name: _files(one) for one in place.packages()} == honest, rots
    assert place.build(*QUICK).returncode == 0
