"""An honest registry on any store, one who may write to it unasked, and what must hold after that.

    world = make_world(store, home)            # in an empty store; raw access is `world.raw`
    ...                                        # an attack, signed by `world.stranger`
    assert world.perform("pull") == make_world(other_store, other_home).perform("pull")

Every test here takes seeds from `hostile_cases`: a few by default, and as many as
`ENGINESMITH_HOSTILE_CASES` says in `make test-soak`: `100`, or `100-200` for those from 100 on. The
seed is in the name of the test.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import pytest
from typer.testing import CliRunner

from pipeline.answer import failure
from pipeline.cli import make_app
from pipeline.core.errors import ExitCode, PipelineError, escaped
from pipeline.core.published import Package
from pipeline.registry.reference import reference_of
from pipeline.registry.stores import open_store
from pipeline.registry.stores.oci import image
from pipeline.registry.stores.oci.writing import WritableOciStore
from pipeline.registry.stores.publication import WritableStore, WritableTree
from pipeline.registry.trust.private_key import SigningKey
from pipeline.registry.trust.signing import generate_key
from tests.registry.stores.faulty import running
from tests.registry.stores.oci.server import FakeRegistry
from tests.registry.team import CARD, Team

Dump = Mapping[str, bytes]
NAMES = ("tiny", "other")
REFUSALS = frozenset(ExitCode) - {ExitCode.OK, ExitCode.INTERRUPTED}


def hostile_cases(few: int) -> list[int]:
    """Seeds: a few, or those that the environment says."""
    asked = os.environ.get("ENGINESMITH_HOSTILE_CASES", str(few))
    return list(range(*map(int, asked.split("-"))))


class RawStore(Protocol):
    """A store as the one sees it who holds every right there, and asks none of our code."""

    def dump(self) -> Dump:
        """Every object; in OCI manifests by `name:tag`, and blobs by `name@digest`."""

    def write(self, key: str, data: bytes) -> None:
        """Make or replace an object."""

    def delete(self, key: str) -> None:
        """Remove it."""


@dataclass(frozen=True)
class RawFolder:
    root: Path

    def dump(self) -> Dump:
        paths = (path for path in self.root.rglob("*") if path.is_file() and not path.is_symlink())
        return {path.relative_to(self.root).as_posix(): path.read_bytes() for path in paths}

    def write(self, key: str, data: bytes) -> None:
        self.delete(key)
        (self.root / key).parent.mkdir(parents=True, exist_ok=True)
        (self.root / key).write_bytes(data)

    def delete(self, key: str) -> None:
        path = self.root / key
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class RawBucket:
    store: WritableTree

    def dump(self) -> Dump:
        objects = self.store.objects
        return {one.key: objects.read(one.key, 64 << 20) or b"" for one in objects.listed("")}

    def write(self, key: str, data: bytes) -> None:
        self.store.objects.replace(key, data)

    def delete(self, key: str) -> None:
        self.store.objects.delete([key])


@dataclass(frozen=True)
class RawOci:
    store: WritableOciStore

    def dump(self) -> Dump:
        found: dict[str, bytes] = {}
        for name in (*NAMES, "registry"):
            repository = self.store.repository(name)
            for tag in repository.tags():
                found[f"{name}:{tag}"] = document = repository.manifest(tag) or b""
                value = json.loads(document)
                for blob in (value["config"], *value["layers"]):
                    path = f"blobs/{blob['digest']}"
                    found[f"{name}@{blob['digest']}"] = repository.ask("GET", path).body
        return dict(sorted(found.items(), key=lambda one: "@" not in one[0]))

    def write(self, key: str, data: bytes) -> None:
        name, _, tag = key.partition(":")
        if "@" in name:
            self.store.repository(name.partition("@")[0]).put_blob(data, "application/octet-stream")
        else:
            self.store.repository(name).put_manifest(tag, data)

    def delete(self, key: str) -> None:
        name, _, tag = key.partition(":")
        repository = self.store.repository(name)
        if "@" not in name and (document := repository.manifest(tag)) is not None:
            repository.delete_manifest(image.digest_of(document))


def raw_of(store: WritableStore) -> RawStore:
    if isinstance(store, WritableOciStore):
        return RawOci(store)
    assert isinstance(store, WritableTree)
    return RawFolder(Path(store.url)) if store.local else RawBucket(store)


COMMANDS: Mapping[str, tuple[str, ...]] = {
    "pull": ("pull tiny", "pull tiny:candidate", "pull {yanked@}", "pull other"),
    "verify": ("verify {good}", "verify {yanked@}", "verify {worse} --gpu rtx4090"),
    "folder": ("pull {yanked@} --allow-yanked", "verify {last}", "pull tiny", "verify {last}"),
    "generate": ("generate tiny hi", "generate {yanked} hi", "generate {good@} hi"),
    "promote": ("promote {spare}", "promote {worse@}", "promote {yanked}", "channels", "pull tiny"),
    "yank": ("yank {good} --reason slow", "pull tiny", "yank {yanked} --undo", "verify {yanked}"),
    "list": ("list", "channels --history", "list"),
    "show": ("show {good}", "show {worse@}", "show {yanked}", "show tiny"),
    "gc": ("gc", "gc --delete --keep-days 2", "list"),
    "copy": ("copy {good} --to {home}/copy", "copy {yanked} --to {home}/copy"),
    "rollback": ("rollback tiny", "rollback other", "pull tiny"),
    "next": ("next", "pull tiny", "channels"),
}
"""What honest people do; `{good@}` is a reference by digest, `{last}` the last pull's folder."""
_VARYING = frozenset(
    {"registry", "from", "to", "dir", "seconds", "fetched_bytes", "facts", "keyid", "ignored"}
    | {"fault", "why", "message", "faults", "rejected", "leftovers", "freed_bytes"}
)
_VARYING_TEXT = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z?|(yank|signature|test)-[0-9a-f]{16}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command ended with; of its JSON what is the same in two equal registries."""

    command: str
    code: int
    value: Mapping[str, Any] = field(default_factory=dict)
    loaded: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class World:
    """A registry, those who publish to it, and an honest user's home.

    Stable went from `worse`, which a later test found a regression, over `yanked` to `good`;
    candidate is still `worse`; `spare` was accepted and is in no channel; `other` has a recipe of
    its own. Builder, tester and releaser hold a key each; `stranger` is trusted by nobody.
    """

    team: Team
    packages: Mapping[str, Package]
    home: Path
    stranger: SigningKey = field(default_factory=generate_key)

    @property
    def store(self) -> WritableStore:
        return self.team.store

    @property
    def raw(self) -> RawStore:
        return raw_of(self.store)

    def perform(self, command: str) -> list[Outcome]:
        """All of one line of `COMMANDS`."""
        return [self.run(text) for text in COMMANDS[command]]

    def run(self, text: str) -> Outcome:
        """One command; a traceback, an escape on the screen or a wrong byte is a failure."""
        if text == "next":
            return self._publish_next()
        words = text.format_map({**self._references(), "home": self.home}).split()
        before = set(self.home.iterdir())
        goal = self.home / f"goal-{len(before)}"
        if words[0] == "pull":
            words += ["--to", str(goal), "--gpu", "rtx4090"]
        words += ["--from" if words[0] == "copy" else "--registry", self.store.url, "--json"]
        loaded: dict[str, bytes] = {}
        with _loading(loaded), _later(90.0 if words[0] == "gc" else 0.0):
            result = CliRunner().invoke(make_app(words[0]), words, env=self._environ())
        shown, error = result.output, result.exception
        if isinstance(error, PipelineError):
            shown += escaped(failure(error).message)  # as the entry point shows it
        elif error is not None and not isinstance(error, SystemExit):
            raise AssertionError(f"{' '.join(words)} ended with a traceback") from error
        assert "\x1b" not in shown, f"{words} shows {shown!r}"
        answer = json.loads(result.stdout.splitlines()[-1])
        assert set(self.home.iterdir()) <= {*before, goal, self.home / "copy"}, "left something"
        if goal.exists():
            loaded = engine_of(goal)
        if loaded:  # then exactly the bytes of one package
            assert loaded in [engine_of(one.dir) for one in self.packages.values()]
        return Outcome(
            command=text, code=answer["exit_code"], value=self._compared(answer), loaded=loaded
        )

    def _publish_next(self) -> Outcome:
        """An honest build, test and release go on as if nothing had happened."""
        package, code = self.packages["next"], ExitCode.OK
        try:
            self.store.put_package(package, self.team.statements(package), lambda _: None)
            self.team.test(package, "accepted")
            self.team.enter(package, card=CARD)
        except PipelineError as error:
            code = error.exit_code
        return Outcome(command="next", code=code)

    def _references(self) -> dict[str, str]:
        found = {}
        for name, package in self.packages.items():
            found[name] = str(reference_of(package))
            found[f"{name}@"] = f"{package.manifest['name']}@sha256:{package.digest}"
        goals = sorted(self.home.glob("goal-*"), key=lambda path: path.stat().st_ctime)
        return {**found, "last": str(goals[-1] if goals else self.home)}

    def _environ(self) -> dict[str, str]:
        return {
            "ENGINESMITH_ACTOR": "ada",
            "ENGINESMITH_SIGNING_KEY_PEM": self.team.releaser.private_pem().decode(),
            "ENGINESMITH_POLICY": str(self.team.policy_file()),
            "ENGINESMITH_CACHE": str(self.home / "cache"),
        }

    def _compared(self, value: Any) -> Any:
        """A command's JSON less what differs between two equal registries."""
        if isinstance(value, list):
            return [self._compared(one) for one in value if not self._is_foreign(one)]
        if isinstance(value, dict):
            return {name: self._compared(value[name]) for name in value.keys() - _VARYING}
        return _VARYING_TEXT.sub("", value) if isinstance(value, str) else value

    def _is_foreign(self, value: Any) -> bool:
        """Whether a row is of a version that none of us published: it stays, and proves nothing."""
        if not isinstance(value, dict) or not value.keys() & {"state", "remove"}:
            return False
        if value["reference"] in self._references().values():
            return False
        assert not value.get("remove")
        assert not any(value.get(name) for name in ("signer", "verdicts", "channels", "yanked"))
        return True


@contextlib.contextmanager
def _loading(loaded: dict[str, bytes]) -> Iterator[None]:
    """Let `generate` load a package without a runtime, and show what it loaded."""

    def stream(package: Package, prompt: str, max_tokens: int) -> Iterator[str]:
        loaded.update(engine_of(package.dir))
        yield package.digest

    with pytest.MonkeyPatch.context() as patched:
        module = SimpleNamespace(stream=stream)
        patched.setitem(sys.modules, "pipeline.commands.generating", module)
        yield


@contextlib.contextmanager
def _later(days: float) -> Iterator[None]:
    """Let every store's clock be ahead, for the ages that `gc` sees."""
    with pytest.MonkeyPatch.context() as patched:
        for kind in (WritableTree, WritableOciStore):
            patched.setattr(kind, "now_s", lambda store: time.time() + days * 24 * 3600)
        yield


def engine_of(package_dir: Path) -> dict[str, bytes]:
    """Every file that a runtime would see, less the signature that a pull adds."""
    root = package_dir / "engine"
    paths = (path for path in sorted(root.rglob("*")) if path != root / "model.sig")
    return {str(path.relative_to(root)): path.read_bytes() for path in paths if path.is_file()}


@functools.cache
def _published(family: str) -> tuple[World, Dump]:
    """The honest world, made once in a folder or in a registry in memory, and all its objects."""
    kept = contextlib.ExitStack()
    home = Path(kept.enter_context(tempfile.TemporaryDirectory()))
    atexit.register(kept.close)
    if family == "oci":
        store = kept.enter_context(running(FakeRegistry())).store()
    else:
        store = open_store(str(home / "artifacts"))
    (home / "work").mkdir()
    team = Team(dir=home / "work", store=store)
    packages = {name: team.seal(name.encode()) for name in ("good", "spare", "next")}
    for name in ("worse", "yanked"):
        packages[name] = team.publish(name.encode(), "accepted")
        team.enter(packages[name])
    team.enter(packages["worse"], "candidate")
    team.test(packages["worse"], "regression")
    packages["other"] = team.seal(b"other", name="other")
    for name in ("good", "spare", "other"):
        store.put_package(packages[name], team.statements(packages[name]), lambda _: None)
        team.test(packages[name], "accepted")
    team.enter(packages["good"])
    team.enter(packages["other"])
    team.yank(packages["yanked"])
    return World(team=team, packages=packages, home=home), raw_of(store).dump()


def make_world(store: WritableStore, home: Path, only: Callable[[str], bool] = bool) -> World:
    """The honest world in an empty store, with an honest user's home; or those objects alone."""
    world, dump = _published("oci" if isinstance(store, WritableOciStore) else "tree")
    for name in ("cache", "work"):
        (home / name).mkdir(parents=True)
    raw = raw_of(store)
    for key, data in dump.items():
        if only(key):
            raw.write(key, data)
    return replace(world, team=replace(world.team, dir=home / "work", store=store), home=home)
