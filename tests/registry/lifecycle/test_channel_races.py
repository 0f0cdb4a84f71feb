"""Several movers at once, and movers that are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from pipeline.core.errors import ConflictError, ExitCode, TransientError
from pipeline.core.values import Reference
from pipeline.registry.lifecycle.channels import read_channel, read_log, stale_pointers
from tests.registry.lifecycle.conftest import CARD, VARIANT

World = Any
InChildren = Callable[[Sequence[Callable[[], object]]], list[int]]

_MOVERS = 8
_EACH = 5


def _reference(number: int) -> Reference:
    return Reference(name="tiny", variant=VARIANT, version=f"{number}.0-a", digest=f"{number:064x}")


def _log(world: World) -> Any:
    return read_log(world.store, world.policy, "tiny", VARIANT, "stable", CARD)


def _insist(world: World, targets: Sequence[Reference]) -> None:
    """Move to each target in turn; whoever is overtaken tries again, as the message says."""
    for target in targets:
        for _ in range(200):
            try:
                world.move(target, actor=f"mover-{os.getpid()}")
                break
            except (ConflictError, TransientError):
                continue
        else:
            raise AssertionError(f"{target} never got through")


def test_eight_movers_make_one_chain_with_each_move_once(
    world: World, in_children: InChildren
) -> None:
    targets = [
        [_reference(mover * _EACH + step) for step in range(_EACH)] for mover in range(_MOVERS)
    ]
    codes = in_children([partial(_insist, world, mine) for mine in targets])
    assert codes == [0] * _MOVERS
    moves = _log(world).moves
    assert [move.seq for move in moves] == list(range(1, _MOVERS * _EACH + 1))
    every = [target for mine in targets for target in mine]
    assert sorted(str(move.reference) for move in moves) == sorted(map(str, every))
    assert stale_pointers(world.store, moves[-1:]) == []


def test_one_of_several_with_different_targets_wins_and_the_others_are_told(
    world: World, in_children: InChildren, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = world.move(_reference(0))
    jobs = [partial(world.move, _reference(number), seen=first) for number in range(1, 7)]
    codes = in_children(jobs)
    assert sorted(codes) == [0] + [ExitCode.CONFLICT] * 5
    assert _log(world).newest.reference == _reference(1 + codes.index(0))
    assert len(_log(world).moves) == 2


def test_several_with_one_target_all_succeed_by_one_move(
    world: World, in_children: InChildren
) -> None:
    codes = in_children([partial(world.move, _reference(1))] * 6)
    assert codes == [0] * 6
    assert len(_log(world).moves) == 1


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("before", [None, 1])
def test_sigkill_between_log_and_pointer_leaves_readers_right(
    world: World, in_children: InChildren, before: int | None
) -> None:
    if before is not None:
        world.move(_reference(before))

    def killed() -> None:
        type(world.store).put_channel = _die
        world.move(_reference(2))

    assert in_children([killed]) == [-signal.SIGKILL]
    move = read_channel(world.store, world.policy, "tiny", VARIANT, "stable", CARD)
    assert move is not None
    assert move.reference == _reference(2)
    assert stale_pointers(world.store, [move]) == [f"stable.{CARD}.json"]
    world.move(_reference(2))
    assert len(_log(world).moves) == (1 if before is None else 2)
    assert stale_pointers(world.store, [move]) == []


def test_sigkill_at_any_write_leaves_the_old_or_the_new_target(
    world: World, in_children: InChildren
) -> None:
    world.move(_reference(1))
    for step in range(1, 60):

        def killed(step: int = step) -> None:
            left = step

            def counting(real: Callable[..., Any]) -> Callable[..., Any]:
                def call(*args: Any, **kwargs: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left == 0:
                        _die()
                    return real(*args, **kwargs)

                return call

            for name in ("mkdir", "fsync", "chmod", "rename", "replace", "link", "unlink", "rmdir"):
                setattr(os, name, counting(getattr(os, name)))
            world.move(_reference(step + 1))

        before = _log(world).newest
        (code,) = in_children([killed])
        log = _log(world)
        assert log.fault is None
        assert log.newest.reference in {before.reference, _reference(step + 1)}
        if code == 0:
            assert step > 8  # it was killed at a good number of places
            assert log.newest.reference == _reference(step + 1)
            break
        assert code == -signal.SIGKILL
    else:
        raise AssertionError("it never got through")


def test_a_lost_answer_to_our_own_move_is_a_success(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client library repeats a request whose answer was lost, and finds the name taken."""
    real = type(world.store).put_move

    def twice(self: Any, *args: Any) -> None:
        real(self, *args)
        real(self, *args)

    monkeypatch.setattr(type(world.store), "put_move", twice)
    assert world.move(_reference(1)).seq == 1


def test_a_move_that_the_store_lost_is_no_success(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store whose compare-and-swap is not real: the last one to write wins."""
    real = type(world.store).put_move

    def lost(self: Any, name: str, variant: str, file: str, data: bytes) -> None:
        monkeypatch.setattr(type(world.store), "put_move", real)
        world.move(_reference(9), actor="eve")

    monkeypatch.setattr(type(world.store), "put_move", lost)
    with pytest.raises(ConflictError, match="eve moved stable"):
        world.move(_reference(1))
    assert _log(world).newest.reference == _reference(9)

    monkeypatch.setattr(type(world.store), "put_move", lambda *_: None)
    with pytest.raises(TransientError, match="not to be seen yet"):
        world.move(_reference(1))


def test_a_taken_name_without_a_visible_move_is_to_be_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(*_: Any) -> None:
        raise ConflictError("taken")

    monkeypatch.setattr(type(world.store), "put_move", taken)
    with pytest.raises(TransientError, match="try again"):
        world.move(_reference(1))
