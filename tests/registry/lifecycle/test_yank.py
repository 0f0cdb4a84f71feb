"""Yanks: who is stopped, who is not, and what strangers can do about it."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

import pytest

from pipeline.core.errors import ConflictError, NotFoundError, RecipeError, UntrustedError
from pipeline.core.values import Reference
from pipeline.registry.lifecycle.records import Yank, now, sign_record
from pipeline.registry.lifecycle.yank import (
    YANK_ENVELOPE,
    read_yank_of,
    require_not_yanked,
    yank_package,
)
from pipeline.registry.signing.keys import generate_key
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.stores.store import Place
from tests.registry.signing.certificates import authority

World = Any


def _yank(world: World, reference: Reference, **more: Any) -> tuple[Yank, bool]:
    return yank_package(
        world.store, reference, world.author(reason="crashes"), world.policy, **more
    )


def _read(world: World, reference: Reference) -> Yank | None:
    return read_yank_of(world.store, reference, world.policy)


def test_yank_stops_promotion_until_it_is_undone(world: World) -> None:
    reference = world.publish()
    yank, changed = _yank(world, reference)
    assert changed
    assert _read(world, reference) == yank
    with pytest.raises(UntrustedError, match=r"was yanked by ada at .*: crashes"):
        world.promote(f"tiny:{reference.version}")
    undone, changed = _yank(world, reference, undo=True)
    assert (undone.seq, undone.yanked, changed) == (2, False, True)
    assert _read(world, reference) is None
    world.promote(f"tiny:{reference.version}")


def test_yanking_twice_is_one_yank(world: World) -> None:
    reference = world.publish()
    first, _ = _yank(world, reference)
    assert _yank(world, reference) == (first, False)
    names = [stored.name for stored in world.store.statements(Place.of(reference))]
    assert sorted(names) == ["build-1", "test-1", "yank-000001"]


def test_a_yank_is_of_one_package(world: World) -> None:
    reference, other = world.publish("1.0"), world.publish("2.0")
    _yank(world, reference)
    assert _read(world, other) is None


def test_a_yank_needs_a_reason_and_an_undo_needs_a_yank(world: World) -> None:
    reference = world.publish()
    with pytest.raises(RecipeError, match="--reason: say why"):
        yank_package(world.store, reference, world.author(), world.policy)
    with pytest.raises(RecipeError, match="is not yanked"):
        _yank(world, reference, undo=True)
    with pytest.raises(NotFoundError):
        _yank(world, replace(reference, version="9.0-0"))


def test_the_flag_lets_through_and_is_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    yank, _ = _yank(world, world.publish())
    with pytest.raises(UntrustedError, match=r"tiny@sha256:[0-9a-f]{64} with --allow-yanked"):
        require_not_yanked(yank)
    with caplog.at_level(logging.WARNING):
        require_not_yanked(yank, allowed=True)
    assert re.search(r"was yanked by ada at \S+: crashes; taken because of --allow-", caplog.text)
    require_not_yanked(None)


def test_strangers_can_neither_yank_nor_undo(world: World) -> None:
    reference = world.publish()
    yank, _ = _yank(world, reference)
    place, stranger = Place.of(reference), generate_key()
    undo = sign_record(replace(yank, seq=2, yanked=False), stranger)
    world.store.put_statement(place, "yank-000002", {YANK_ENVELOPE: undo})
    world.store.put_statement(place, "yank-000003", {"notes.txt": b"please"})
    assert _read(world, reference) == yank
    undone, _ = _yank(world, reference, undo=True)
    assert undone.seq == 4  # theirs are passed over
    assert _read(world, reference) is None
    again = sign_record(replace(yank, seq=5), stranger)
    world.store.put_statement(place, "yank-000005", {YANK_ENVELOPE: again})
    assert _read(world, reference) is None
    with pytest.raises(UntrustedError, match="is not trusted here"):
        yank_package(
            world.store,
            reference,
            replace(world.author(reason="x"), key=stranger),
            world.policy,
        )
    assert "yank-000006" not in {one.name for one in world.store.statements(place)}


def test_a_yank_outlasts_its_certificate_and_what_undoes_one_does_not(world: World) -> None:
    reference, ca = world.publish(), authority()
    policy = replace(world.policy, identities=(ca.trusted("channels"),))
    place, expired = Place.of(reference), ca.signer(days=(-5, -1))
    yank = Yank(reference=reference, seq=1, yanked=True, actor="ada", reason="crashes", at=now())
    world.store.put_statement(place, "yank-000001", {YANK_ENVELOPE: sign_record(yank, expired)})
    believed = replace(yank, signer="workflow")
    assert read_yank_of(world.store, reference, policy) == believed
    for seq, signer in ((2, expired), (3, authority().signer(days=(-5, -1)))):
        undo = sign_record(replace(yank, seq=seq, yanked=False), signer)
        world.store.put_statement(place, f"yank-{seq:06d}", {YANK_ENVELOPE: undo})
        assert read_yank_of(world.store, reference, policy) == believed


@pytest.mark.parametrize("where", ["later", "other package"])
def test_an_undo_that_was_copied_undoes_nothing(world: World, where: str) -> None:
    reference, other = world.publish("1.0"), world.publish("2.0")
    _yank(world, reference)
    _yank(world, reference, undo=True)
    undo = world.store.read_statement(Place.of(reference), "yank-000002")
    victim = reference if where == "later" else other
    yank, _ = _yank(world, victim)
    name = f"yank-{yank.seq + 1:06d}"
    world.store.put_statement(Place.of(victim), name, undo)
    assert _read(world, victim) == yank


def test_a_revoked_key_yanks_nothing(world: World) -> None:
    reference = world.publish()
    _yank(world, reference)
    revoked = TrustPolicy(keys=world.policy.keys, revoked_keys=(world.key.public.keyid,))
    assert read_yank_of(world.store, reference, revoked) is None


def test_two_who_yank_at_once_agree(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = world.publish()
    store = world.store
    real = type(store).put_statement

    def overtaken(self: Any, place: Place, name: str, files: Any) -> bool:
        monkeypatch.setattr(type(store), "put_statement", real)
        yank_package(store, reference, world.author("eve", "leaks"), world.policy)
        made: bool = real(self, place, name, files)
        return made

    monkeypatch.setattr(type(store), "put_statement", overtaken)
    yank, changed = _yank(world, reference)
    assert (yank.actor, yank.seq, changed) == ("eve", 1, False)


def test_a_store_that_always_refuses_ends_in_a_conflict(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = world.publish()

    def taken(*_: Any) -> bool:
        raise ConflictError("taken")

    monkeypatch.setattr(type(world.store), "put_statement", taken)
    with pytest.raises(ConflictError, match="others yank"):
        _yank(world, reference)
