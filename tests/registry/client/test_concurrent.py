"""Many pullers at once, and a kill at any moment."""

from __future__ import annotations

import errno
import fcntl
import random
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.registry.client.deliver import verify_layout
from tests.registry.client.conftest import CHUNK_BYTES, Shop, engine_files, noise
from tests.registry.client.faulty_store import FaultyStore
from tests.registry.client.kills import killed_after, points

InChildren = Callable[[Sequence[Callable[[], object]]], list[int]]
_PULLERS = 16


def _counted_pull(shop: Shop, number: int, **more: Any) -> None:
    """Pull in a process of its own; leaves how many bytes the store sent."""
    store = FaultyStore(store=shop.store, local=False)
    shop.pull(store=store, **{"to": shop.home / f"to-{number}", **more})
    (shop.home / f"sent-{number}").write_text(str(store.sent_bytes))


def _sent(shop: Shop) -> list[int]:
    return [int(path.read_text()) for path in shop.home.glob("sent-*")]


def _entries(tmp_path: Path) -> list[str]:
    packages = tmp_path / "cache" / "packages"
    assert not list(packages.glob(".*"))
    return sorted(path.name for path in packages.glob("*/*/*"))


def test_of_16_pullers_of_one_package_one_downloads_and_one_copy_is_kept(
    shop: Shop, in_children: InChildren, tmp_path: Path
) -> None:
    reference = shop.publish()
    codes = in_children([partial(_counted_pull, shop, number) for number in range(_PULLERS)])
    assert codes == [0] * _PULLERS
    sent = sorted(_sent(shop))
    assert sent[:-1] == [0] * (_PULLERS - 1)
    assert sent[-1] > 0
    assert _entries(tmp_path) == [reference.version, f"{reference.version}.statements"]
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
    codes = in_children([partial(_counted_pull, shop, number) for number in range(_PULLERS)])
    assert codes == [0] * _PULLERS
    assert _entries(tmp_path) == [reference.version, f"{reference.version}.statements"]
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
    wanted = {f"shard-{n}": noise(12 * CHUNK_BYTES + n, n) for n in range(2)}
    reference = shop.publish(wanted)
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
        assert engine_files(shop.to) == wanted
        assert verify_layout(shop.to).digest == reference.digest
        assert shop.left() == ["tiny"]
        if through_cache:
            assert _entries(tmp_path) == [reference.version, f"{reference.version}.statements"]
    assert killed
