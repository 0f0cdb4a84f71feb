"""The whole life of a recipe on each kind of store, against real servers."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pipeline.registry.lifecycle.channels import read_channels, read_log, stale_pointers
from pipeline.registry.lifecycle.yank import read_yank_of, yank_package
from pipeline.registry.stores.store import Place

from pipeline.core.errors import ConflictError, NotFoundError, TransientError, UntrustedError
from pipeline.core.values import Reference
from pipeline.registry.lifecycle import gc
from tests.registry.backends import Backends, backends, running_backends
from tests.registry.lifecycle.conftest import CARD, VARIANT, World

InChildren = Callable[[Sequence[Callable[[], object]]], list[int]]


@pytest.fixture(scope="module")
def servers() -> Iterator[Backends]:
    with running_backends() as started:
        yield started


@pytest.fixture(params=backends)
def anywhere(
    request: pytest.FixtureRequest,
    servers: Backends,
    bench: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    home = tmp_path / "home"
    home.mkdir()
    store = servers.store(request.param, tmp_path / "artifacts")
    for name, value in servers.environ(request.param).items():
        monkeypatch.setenv(name, value)
    return World(bench=bench, store=store, home=home)


def test_promote_roll_back_yank_and_collect(
    anywhere: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = anywhere.publish("1.0"), anywhere.publish("2.0")
    never = anywhere.publish("3.0", "checked")
    anywhere.promote(f"tiny:{first.version}", "candidate")
    for reference in (first, second):
        anywhere.promote(f"tiny:{reference.version}")
    assert anywhere.rollback().move.reference == first
    yank_package(anywhere.store, second, anywhere.author(reason="crashes"), anywhere.policy)
    with pytest.raises(UntrustedError, match="was yanked"):
        anywhere.rollback()
    yank_package(anywhere.store, second, anywhere.author(), anywhere.policy, undo=True)
    assert read_yank_of(anywhere.store, second, anywhere.policy) is None
    moves = read_channels(anywhere.store, anywhere.policy, "tiny", VARIANT)
    assert [(move.channel, move.seq, move.reference) for move in moves] == [
        ("candidate", 1, first),
        ("stable", 3, first),
    ]
    assert stale_pointers(anywhere.store, moves) == []

    rules = gc.Rules()
    assert not [
        fate for fate in gc.collect(anywhere.store, anywhere.policy, rules).fates if fate.remove
    ]
    now_s = anywhere.store.now_s()
    assert abs(now_s - time.time()) < 60
    monkeypatch.setattr(type(anywhere.store), "now_s", lambda _: now_s + 90 * gc.DAY_S)
    done = gc.collect(anywhere.store, anywhere.policy, rules, delete=True)
    assert done.removed == (Place.of(never),)
    assert done.freed_bytes > 0
    assert anywhere.store.versions("tiny", VARIANT) == sorted([first.version, second.version])
    with pytest.raises(NotFoundError):
        anywhere.store.read_manifest(Place.of(never))
    assert anywhere.rollback().move.reference == second


def test_a_log_that_was_touched_is_refused_everywhere(anywhere: World) -> None:
    reference = anywhere.publish()
    anywhere.promote(f"tiny:{reference.version}")
    (data,) = anywhere.store.moves("tiny", VARIANT).values()
    anywhere.store.put_move("tiny", VARIANT, f"stable.{CARD}.000002.dsse.json", data)
    with pytest.raises(UntrustedError, match="is move 1 of"):
        read_channels(anywhere.store, anywhere.policy, "tiny", VARIANT)


def _insist(world: World, targets: Sequence[Reference]) -> None:
    # A connection must not be shared with the process that was forked from.
    mine = dataclasses.replace(world, store=dataclasses.replace(world.store))  # type: ignore[type-var]
    for target in targets:
        for _ in range(200):
            try:
                mine.move(target, actor=f"mover-{os.getpid()}")
                break
            except (ConflictError, TransientError):
                continue
        else:
            raise AssertionError(f"{target} never got through")


def test_movers_at_once_make_one_chain_everywhere(anywhere: World, in_children: InChildren) -> None:
    published = anywhere.publish()
    targets = [
        [dataclasses.replace(published, digest=f"{mover * 10 + step:064x}") for step in range(2)]
        for mover in range(4)
    ]
    codes = in_children([partial(_insist, anywhere, mine) for mine in targets])
    assert codes == [0] * 4
    log = read_log(anywhere.store, anywhere.policy, "tiny", VARIANT, "stable", CARD)
    assert log.fault is None
    every = sorted(target.digest for mine in targets for target in mine)
    assert sorted(move.reference.digest for move in log.moves) == every
