"""One who runs the server, or the way to it: every command ends, and nothing but bytes is lost."""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ExitCode, PipelineError, TransientError
from pipeline.core.workfolder import hold_lock
from pipeline.registry.reference import reference_of
from pipeline.registry.stores import open_store
from tests.hostile.hostile_server import GREEDY, SLOW, Malice, Thief, lying, page
from tests.hostile.world import REFUSALS, World, engine_of, hostile_cases, make_world
from tests.registry.stores.faulty import Fault, FaultyServer, refusing, running
from tests.registry.stores.oci.server import PASSWORD, USER, FakeRegistry
from tests.sources.hub_server import COMMIT, REPO, SOURCE, HubServer
from tests.tiny_recipe import QUICK, RECIPE, make_workplace

SECRETS = (
    *(b"secret-of-the-test", PASSWORD.encode(), b"PRIVATE KEY", b"hf_secret"),
    base64.b64encode(f"{USER}:{PASSWORD}".encode()),
)
READING = [
    *("pull tiny", "pull {good@}", "list", "show {good}", "verify {good}", "generate {good} hi"),
    *("gc", "channels --history", "copy {good} --to {home}/copy"),
]
WRITING = ["promote {spare}", "yank {good} --reason slow", "gc --delete --keep-days 2", "publish"]


@pytest.fixture(params=["s3", "oci"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(request: pytest.FixtureRequest, kind: str) -> FaultyServer:
    found: FaultyServer = request.getfixturevalue(f"memory_{kind}")
    return found


@pytest.fixture
def world(request: pytest.FixtureRequest, server: FaultyServer, kind: str, tmp_path: Path) -> World:
    """An honest registry, which from now on wants a password if it is one that can."""
    made = make_world(request.getfixturevalue(f"memory_{kind}_store"), tmp_path / "home")
    if isinstance(server, FakeRegistry):
        patched: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
        server.auth = "bearer"
        for name, value in (("HOST", server.host), ("USERNAME", USER), ("PASSWORD", PASSWORD)):
            patched.setenv(f"ENGINESMITH_OCI_{name}", value)
    return made


@pytest.fixture
def thief() -> Iterator[Thief]:
    with running(Thief()) as server:
        yield server


@pytest.fixture
def hasty() -> Iterator[pytest.MonkeyPatch]:
    """All deadlines a hundredth of what they are, until this is undone."""
    monkeypatch = pytest.MonkeyPatch()
    for name, seconds in {
        "core.patience.PATIENCE_S": 0.6,
        "registry.stores.transfer.SILENCE_S": 0.2,
        "registry.stores.transfer.REPLY_S": 0.01,
        "registry.stores.transfer.WINDOW_S": 0.3,
        "registry.stores.oci.transport._MAX_WAIT_S": 0.2,
        "registry.stores.oci.writing.SETTLE_S": 0.01,
        "sources.hub.REPLY_S": 0.01,
        "registry.client.download.FIRST_WAIT_S": 0.01,
    }.items():
        monkeypatch.setattr(f"pipeline.{name}", seconds)
    yield monkeypatch
    monkeypatch.undo()


def perform(world: World, text: str) -> tuple[int, bool]:
    """Exit code of a command, and whether it loaded the package that it should."""
    if text == "publish":
        package = world.packages["next"]
        try:
            store = open_store(world.store.url)
            store.put_package(package, world.team.statements(package), lambda _: None)
        except PipelineError as error:
            return error.exit_code, True
        return 0, True
    done = world.run(text)
    return done.code, not done.loaded or done.loaded == engine_of(world.packages["good"].dir)


@pytest.mark.parametrize("seed", [3 * one + more for one in hostile_cases(5) for more in range(3)])
def test_whatever_a_server_answers_a_command_ends_and_the_next_one_works(
    seed: int, world: World, server: FaultyServer, thief: Thief, hasty: pytest.MonkeyPatch
) -> None:
    choose = random.Random(seed)
    slow = choose.random() < 0.4
    text = choose.choice(READING * 2 + WRITING)
    named, fault = choose.choice(list(SLOW.items())) if slow else ("", lying(choose, thief.host))
    share = choose.choice((1.0, 1.0, 0.3, 0.05))
    Malice(choose=choose, fault=fault, after=choose.randrange(12), share=share).take(server)
    began_s = time.monotonic()
    code, right = perform(world, text)
    what = f"{text} with {named or fault} ended with {code}"
    assert time.monotonic() - began_s < 20.0, what
    assert code in {ExitCode.OK, *REFUSALS}, what
    assert right or not slow, f"{what} and another package than from an honest server"
    if slow and code and share == 1.0:
        assert code == ExitCode.TRANSIENT, what
    assert not [secret for secret in SECRETS if secret in thief.got]
    del server.fault_for
    hasty.undo()
    for again in dict.fromkeys(["list", *({text} & set(READING))]):
        assert world.run(again).code == 0, f"{again} after {what}"


@pytest.mark.parametrize("kind", ["oci"], indirect=True)
def test_a_copy_shows_no_registry_the_secrets_of_the_other(
    world: World, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(FakeRegistry()) as other:
        vars(other).update(blobs=server.blobs, manifests=dict(server.manifests))  # type: ignore[attr-defined]
        theirs = base64.b64encode(b"bob:hunter2").decode()
        config = {"auths": {other.host: {"auth": theirs}}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
        other.fail("GET", "", refusing(401, "UNAUTHORIZED", WWW_Authenticate='Basic realm="x"'))
        source = world.store.url.replace(server.host, other.host)
        target = f"oci://{server.host}/copies"
        for there, goal in ((source, target), (target, source)):
            from_there = replace(world, team=replace(world.team, store=open_store(there)))
            assert from_there.run(f"copy {{good}} --to {goal}").code == 0
        told = {one.headers.get("Authorization") for one in other.seen} - {None}
        assert told == {f"Basic {theirs}"}
        assert theirs not in str([one.headers for one in server.seen])


def test_a_hung_pullers_lock_is_not_waited_for_without_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = reference_of(world.packages["good"]).version
    monkeypatch.setattr("pipeline.registry.client.deliver._STALLED_S", 0.5)
    with hold_lock(world.home / "cache" / "locks" / f"package-{version}.lock"):
        began_s = time.monotonic()
        assert world.run("pull tiny").code == 0
        assert time.monotonic() - began_s < 20.0


def turn(hub: HubServer, fault: Fault, part: str = "") -> None:
    """Let requests to the Hub and its CDN whose path holds `part` meet a fault."""
    for server in (hub._hub, hub._cdn):
        server.closing = threading.Event()  # type: ignore[attr-defined]
        handler: Any = server.RequestHandlerClass

        def answer(self: Any, honest: Callable[[Any], None] = handler.answer) -> None:
            if part not in self.path or not fault(self):
                honest(self)

        handler.answer = answer


@pytest.mark.parametrize("part", ["", "/cdn/", "config.json"])
@pytest.mark.parametrize("name", ["silent", "head", "body", "long", "zipped"])
def test_a_download_from_the_hub_ends(
    name: str, part: str, hasty: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hasty.setenv("ENGINESMITH_CACHE", str(tmp_path))
    hasty.setenv("HF_TOKEN", "hf_secret")
    hasty.setattr("pipeline.sources.hub._MAX_DOCUMENT_BYTES", 1 << 20)
    with HubServer() as hub:
        turn(hub, {**SLOW, **GREEDY}[name], part)
        hasty.setenv("HF_ENDPOINT", hub.endpoint)
        began_s = time.monotonic()
        with pytest.raises(TransientError):
            SOURCE.fetch()
        assert time.monotonic() - began_s < 20.0
        there = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        assert there < 4 << 20
        for server in (hub._hub, hub._cdn):
            server.closing.set()  # type: ignore[attr-defined]


CHILD = """
import sys
from pathlib import Path
from pipeline.cli import main
code = main()
print("peak", Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0], flush=True)
sys.exit(code)
"""
DEADLINE_S, MOST_BYTES = 120.0, 256 << 20
PULL = "pull tiny --gpu rtx4090 --to {to}"
TRUE_CASES: list[tuple[str, str, int, int | tuple[int, int]]] = [
    *((PULL, name, 6, 9) for name in ("silent", "body", "stalls", "busy", "inside", "silent")),
    *((PULL, name, 0, 9) for name in ("head", "continue")),
    *(("list", name, 0, 9) for name in ("body", "pages")),
    *(("list", "long", 0, 4), ("list", "zipped", 0, 9), ("list", "deep", 1, (0, 4))),
    *(("promote tiny", "chunks", 9, 9), ("gc", "error", 2, 9), ("verify tiny", "long", 7, (9, 4))),
    *(("yank {spare} --reason slow", "silent", 5, 9), ("gc --delete --keep-days 2", "body", 5, 9)),
    *(("generate {good} hi", "stalls", 5, 9), ("copy {good} --to {to}", "silent", 5, 9)),
    *(("build smollm2", "silent", 0, 9), ("channels", "stalls", 2, 9), ("show tiny", "head", 3, 9)),
]
"""Command, fault, honest replies before it, exit code (on S3 and on OCI): 9 if what was asked for
did not come to its end, 4 if it is wrong whatever follows, 0 for a list that says `damaged`."""


def run_child(
    words: Sequence[str], environ: Mapping[str, str], folder: Path | None = None
) -> tuple[int, float, int]:
    """Exit code, seconds and peak memory of a command in a process of its own."""
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words],
        env={**os.environ, **environ}, capture_output=True, text=True, check=False, timeout=600,
        cwd=folder,
    )  # fmt: skip
    peak = next((line for line in done.stdout.splitlines() if line.startswith("peak ")), "")
    assert peak, done.stderr
    return done.returncode, time.monotonic() - began_s, int(peak.split()[1]) << 10


def fault_of(what: str, done: tuple[int, float, int], wanted: int) -> str:
    """What a command did that it should not; empty for nothing."""
    code, seconds, peak_bytes = done
    told = f"{what}: exit {code}, {seconds:.0f} s, {peak_bytes >> 20} MiB"
    print(told)
    return "" if code == wanted and seconds < DEADLINE_S and peak_bytes < MOST_BYTES else told


@pytest.mark.slow
def test_every_command_ends_in_time_and_in_bounded_memory(
    world: World, server: FaultyServer, tmp_path: Path
) -> None:
    """With the true deadlines, side by side; two pulls of each kind share a cache and its lock."""
    environ = {**world._environ(), "ENGINESMITH_CACHE": str(tmp_path / "cache")}
    key = world.team.releaser
    builder = replace(world.team, dir=tmp_path, builder=key, tester=key).policy_file()

    def run(number: int, case: tuple[str, str, int, int | tuple[int, int]]) -> str:
        text, name, after, ends = case
        kind: Any = type(server)
        with running(kind()) as hostile:
            for field in {"objects", "blobs", "manifests"} & set(vars(server)):
                setattr(hostile, field, getattr(server, field))
            url = world.store.url.replace(server.host, hostile.host)
            places = {**world._references(), "to": tmp_path / f"to-{number}"}
            words = text.format_map(places).split()
            words += ["--from" if words[0] == "copy" else "--registry", url]
            fault = {**SLOW, **GREEDY, "pages": page}[name]
            Malice(choose=random.Random(number), fault=fault, after=after).take(hostile)
            own = {"AWS_ENDPOINT_URL_S3": f"http://{hostile.host}"}
            own |= {"ENGINESMITH_POLICY": str(builder)} if words[0] == "build" else {}
            done = run_child(words, {**environ, **own})
        wanted = ends if isinstance(ends, int) else ends[kind is FakeRegistry]
        return fault_of(f"{text} {name}", done, wanted)

    with ThreadPoolExecutor(len(TRUE_CASES)) as pool:
        assert not list(filter(None, pool.map(run, itertools.count(), TRUE_CASES)))


@pytest.mark.slow
def test_what_asks_the_hub_ends_in_time_and_in_bounded_memory(tmp_path: Path) -> None:
    own = RECIPE.format(model="M").replace("source: local", "source: hub")
    own = own.replace("path: M", f"repo_id: {REPO}, revision: '{COMMIT}'")
    place = make_workplace(tmp_path / "place", tmp_path)
    (place.recipes / "tiny.yaml").write_text(own)

    def run(text: str, name: str) -> str:
        words = text.format(own=place.recipes, quick=" ".join(QUICK)).split()
        with HubServer() as hub:
            turn(hub, SLOW[name])
            done = run_child(words, {**place.env, "HF_ENDPOINT": hub.endpoint}, place.root)
            for server in (hub._hub, hub._cdn):
                server.closing.set()  # type: ignore[attr-defined]
        return fault_of(f"{text} {name}", done, ExitCode.TRANSIENT)

    texts = ["new mine --from acme/tiny", "build tiny --config-dir {own} {quick}"] * 2
    with ThreadPoolExecutor(len(texts)) as pool:
        assert not list(filter(None, pool.map(run, texts, ["silent", "silent", "body", "head"])))
