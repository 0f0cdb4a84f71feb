"""Many pullers at once, and a kill at any moment."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.registry.client.layout import verify_layout
from tests.registry.backends import Backends, backends
from tests.registry.client.conftest import PIECE_BYTES, Shop, engine_files, noise
from tests.registry.client.faulty_store import FaultyStore
from tests.registry.client.kills import killed_after, points

InChildren = Callable[[Sequence[Callable[[], object]]], list[int]]
ShopOf = Callable[[str], Shop]
_PULLERS = 16


def _counted_pull(shop: Shop, number: int, **more: Any) -> None:
    """Pull in a process of its own; leaves how many bytes the store sent."""
    store = FaultyStore(store=shop.store, local=False)
    shop.pull(store=store, **{"to": shop.home / f"to-{number}", **more})
    (shop.home / f"sent-{number}").write_text(str(store.sent_bytes))


def _sent(shop: Shop) -> list[int]:
    return [int(path.read_text()) for path in shop.home.glob("sent-*")]


def _entries(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "packages").iterdir())


def test_of_16_pullers_of_one_package_one_downloads_and_one_copy_is_kept(
    shop: Shop, in_children: InChildren, tmp_path: Path
) -> None:
    reference = shop.publish()
    codes = in_children([partial(_counted_pull, shop, number) for number in range(_PULLERS)])
    assert codes == [0] * _PULLERS
    sent = sorted(_sent(shop))
    assert sent[:-1] == [0] * (_PULLERS - 1)
    assert sent[-1] > 0
    assert _entries(tmp_path) == [reference.digest, f"{reference.digest}.statements"]
    for number in range(_PULLERS):
        assert verify_layout(shop.home / f"to-{number}").digest == reference.digest


@pytest.mark.parametrize("kind", ["granted to everybody", "not there"])
def test_16_pullers_get_good_copies_where_locks_do_nothing(
    shop: Shop,
    in_children: InChildren,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    def flock(*arguments: Any) -> None:
        if kind == "not there":
            raise OSError(errno.ENOLCK, "No locks available")

    reference = shop.publish()
    monkeypatch.setattr(fcntl, "flock", flock)
    # Other pullers of this machine, whose locks work, would take our folders for dead ones.
    monkeypatch.setattr(tempfile, "tempdir", str(shop.home))
    codes = in_children([partial(_counted_pull, shop, number) for number in range(_PULLERS)])
    assert codes == [0] * _PULLERS
    assert _entries(tmp_path) == [reference.digest, f"{reference.digest}.statements"]
    for number in range(_PULLERS):
        assert verify_layout(shop.home / f"to-{number}").digest == reference.digest


def test_16_pullers_to_one_folder_all_succeed(shop: Shop, in_children: InChildren) -> None:
    reference = shop.publish()
    jobs = [
        partial(_counted_pull, shop, number, to=shop.to, through_cache=number % 2 == 0)
        for number in range(_PULLERS)
    ]
    assert in_children(jobs) == [0] * _PULLERS
    assert verify_layout(shop.to).digest == reference.digest
    assert shop.left() == ["tiny"]


def test_two_packages_at_once_do_not_disturb_each_other(
    shop: Shop, in_children: InChildren
) -> None:
    first = shop.publish()
    second = shop.publish(shop.engine(files={"model.plan": noise(9 * PIECE_BYTES, 5)}), name="wide")

    def pull(number: int) -> None:
        name = "tiny" if number % 2 else "wide"
        _counted_pull_of(shop, name, number)

    assert in_children([partial(pull, number) for number in range(8)]) == [0] * 8
    for number in range(8):
        wanted = first if number % 2 else second
        assert verify_layout(shop.home / f"to-{number}").digest == wanted.digest


def _counted_pull_of(shop: Shop, name: str, number: int) -> None:
    shop.pull(
        name,
        store=FaultyStore(store=shop.store, local=False),
        to=shop.home / f"to-{number}",
    )


def _throttled(chunks: Any, file: Any, offset: int) -> Any:
    for chunk in chunks:
        for start in range(0, len(chunk), 1024):
            time.sleep(0.0005)
            yield chunk[start : start + 1024]


def _pull_slowly(shop: Shop, through_cache: bool) -> None:
    store = FaultyStore(store=shop.store, always=_throttled)
    shop.pull(store=store, through_cache=through_cache)


@pytest.mark.parametrize("through_cache", [True, False])
def test_a_kill_at_any_moment_shows_nothing_half_and_the_rerun_completes(
    shop: Shop, through_cache: bool, tmp_path: Path
) -> None:
    engine = shop.engine(files={f"shard-{n}": noise(12 * PIECE_BYTES + n, n) for n in range(2)})
    reference = shop.publish(engine)
    wanted = {path.name: path.read_bytes() for path in engine.dir.iterdir()}
    started = time.monotonic()
    _pull_slowly(shop, through_cache)
    whole_s = time.monotonic() - started
    dice = random.Random(7)
    killed = 0
    for _ in range(points(8)):
        shutil.rmtree(shop.to.parent)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        for _ in range(dice.randint(1, 3)):
            killed += killed_after(
                partial(_pull_slowly, shop, through_cache), dice.uniform(0.0, 1.1) * whole_s
            )
            if shop.to.exists():
                assert verify_layout(shop.to).digest == reference.digest
        shop.pull(through_cache=through_cache)
        got = engine_files(shop.to)
        got.pop("model.sig", None)
        assert got == wanted
        assert verify_layout(shop.to).digest == reference.digest
        assert shop.left() == ["tiny"]
        if through_cache:
            assert _entries(tmp_path) == [reference.digest, f"{reference.digest}.statements"]
    assert killed


@pytest.mark.slow
@pytest.mark.parametrize("backend", backends)
def test_a_killed_command_resumes_with_the_pieces_that_landed(
    shop_of: ShopOf, running: Backends, backend: str, tmp_path: Path
) -> None:
    """The real command with its real pieces, killed at seeded moments."""
    shop = shop_of(backend)
    data = noise(1 << 20) * 300
    reference = shop.publish(shop.engine(files={"model.plan": data + b"end"}))
    environ = {
        **os.environ,
        **running.environ(backend),
        "ENGINESMITH_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(pipeline.__file__).parents[1]),
    }
    command = [sys.executable, "-c", _COMMAND, "tiny", "--to", str(shop.to), "--registry"]
    command += [shop.store.url, "--gpu", "rtx4090", "--policy", str(shop.policy()), "--json"]
    command += ["--jobs", "2"]
    dice = random.Random(11)
    fetched: list[int] = []
    for _ in range(points(3)):
        shutil.rmtree(shop.to.parent, ignore_errors=True)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        child = subprocess.Popen(
            command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(dice.uniform(0.3, 1.5))
        child.kill()
        child.wait()
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        told = json.loads(done.stdout)
        assert told["digest"] == reference.digest
        assert (shop.to / "engine" / "model.plan").read_bytes() == data + b"end"
        assert shop.left() == ["tiny"]
        fetched.append(told["fetched_bytes"])
    assert len(fetched) == points(3)


_COMMAND = """
import sys, typer
from pipeline.commands.pull import pull
app = typer.Typer()
app.command()(pull)
app(sys.argv[1:])
"""
