"""The log of moves: what a reader believes, and what it refuses."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
import rfc8785

from pipeline.core.errors import ConflictError, RecipeError, UntrustedError
from pipeline.core.values import Reference
from pipeline.registry.lifecycle.channels import (
    read_channel,
    read_channels,
    read_log,
    stale_pointers,
)
from pipeline.registry.lifecycle.records import (
    MOVE_TYPE,
    YANK_TYPE,
    Author,
    Move,
    read_move,
    sign_record,
)
from pipeline.registry.signing.envelope import sign_envelope
from pipeline.registry.signing.keys import generate_key
from pipeline.registry.signing.trust import TrustPolicy
from tests.registry.lifecycle.conftest import CARD, OTHER_CARD, VARIANT
from tests.registry.signing.conftest import trusted

World = Any
_PEOPLES = {"actor", "reason", "at"}


def _reference(version: str, digit: str = "a") -> Reference:
    return Reference(name="tiny", variant=VARIANT, version=version, digest=digit * 64)


A, B, C = _reference("1.0-a"), _reference("2.0-b", "b"), _reference("3.0-c", "c")


def _read(world: World, channel: str = "stable", policy: TrustPolicy | None = None) -> Move | None:
    return read_channel(world.store, policy or world.policy, "tiny", VARIANT, channel, CARD)


def _file(seq: int, channel: str = "stable", card: str = CARD) -> str:
    return f"{channel}.{card}.{seq:06d}.dsse.json"


def test_moves_are_counted_chained_and_shown(world: World) -> None:
    first = world.move(A)
    second = world.move(B, reason="faster")
    assert (first.seq, first.prev, second.seq, second.prev) == (1, None, 2, first.sha256)
    assert second.signer == "release"
    assert _read(world) == second
    shown = json.loads(world.pointer())
    assert shown["version"] == B.version
    assert shown["digest"] == B.digest
    assert shown["seq"] == 2
    assert shown["reason"] == "faster"
    assert sorted(path.name for path in world.log_dir().iterdir()) == [_file(1), _file(2)]


def test_what_is_signed_is_canonical_json_with_exactly_these_fields(world: World) -> None:
    world.move(A)
    envelope = json.loads((world.log_dir() / _file(1)).read_text())

    assert envelope["payloadType"] == MOVE_TYPE
    payload = base64.b64decode(envelope["payload"])
    value = json.loads(payload)
    assert rfc8785.dumps(value) == payload
    assert sorted(value) == sorted(
        [
            "schema",
            "name",
            "variant",
            "channel",
            "card",
            "version",
            "digest",
            "seq",
            "prev",
            "actor",
            "reason",
            "at",
        ]
    )


def test_the_same_target_again_is_no_move(world: World) -> None:
    first = world.move(A)
    assert world.move(A) == first
    assert len(list(world.log_dir().iterdir())) == 1


def test_a_channel_that_was_never_moved_is_none(world: World) -> None:
    assert _read(world) is None
    assert read_channels(world.store, world.policy, "tiny", VARIANT) == []


def test_channels_and_cards_are_apart(world: World) -> None:
    world.move(A)
    world.move(B, card=OTHER_CARD)
    world.move(C, channel="candidate")
    found = read_channels(world.store, world.policy, "tiny", VARIANT)
    assert [(move.channel, move.card, move.reference) for move in found] == [
        ("candidate", CARD, C),
        ("stable", CARD, A),
        ("stable", OTHER_CARD, B),
    ]


def test_an_unsigned_pointer_without_a_log_is_not_believed(world: World) -> None:
    world.store.put_channel("tiny", VARIANT, f"stable.{CARD}.json", b"{}")
    assert _read(world) is None


def test_an_edited_pointer_loses_and_the_next_move_repairs_it(world: World) -> None:
    move = world.move(A)
    good = world.pointer()
    world.store.put_channel("tiny", VARIANT, f"stable.{CARD}.json", good.replace(b"1.0-a", b"9.9"))
    assert stale_pointers(world.store, [move]) == [f"stable.{CARD}.json"]
    assert _read(world) == move
    world.move(A)  # no move, and yet it repairs
    assert world.pointer() == good
    assert stale_pointers(world.store, [move]) == []


def _break_replayed(world: World) -> None:
    """The first move, brought back as the newest."""
    old = (world.log_dir() / _file(1)).read_bytes()
    world.store.put_move("tiny", VARIANT, _file(4), old)


def _break_swapped(world: World) -> None:
    one, two = (world.log_dir() / _file(seq) for seq in (1, 2))
    first, second = one.read_bytes(), two.read_bytes()
    for path, data in ((one, second), (two, first)):
        path.chmod(0o644)
        path.write_bytes(data)


def _break_gap(world: World) -> None:
    (world.log_dir() / _file(2)).unlink()


def _break_beginning(world: World) -> None:
    (world.log_dir() / _file(1)).unlink()


def _break_bit(world: World) -> None:
    path = world.log_dir() / _file(2)
    path.chmod(0o644)
    value = json.loads(path.read_bytes())
    payload = value["payload"]
    value["payload"] = payload[:40] + ("A" if payload[40] != "A" else "B") + payload[41:]
    path.write_text(json.dumps(value))


def _break_rubbish(world: World) -> None:
    world.store.put_move("tiny", VARIANT, _file(4), b"rubbish")


def _break_other_card(world: World) -> None:
    """A good move of another card, as the next one of this."""
    for reference in (A, B, C, A):
        world.move(reference, card=OTHER_CARD)
    data = (world.log_dir() / _file(4, card=OTHER_CARD)).read_bytes()
    world.store.put_move("tiny", VARIANT, _file(4), data)


def _break_other_channel(world: World) -> None:
    for reference in (A, B, C, A):
        world.move(reference, channel="candidate")
    data = (world.log_dir() / _file(4, "candidate")).read_bytes()
    world.store.put_move("tiny", VARIANT, _file(4), data)


def _forge(world: World, **change: Any) -> bytes:
    newest = _read(world)
    assert newest is not None
    move = replace(newest, reference=A, seq=4, prev=newest.sha256)
    return sign_record(replace(move, **change), world.key)


def _break_other_key(world: World) -> None:
    newest = _read(world)
    assert newest is not None
    move = replace(newest, reference=A, seq=4, prev=newest.sha256)
    world.store.put_move("tiny", VARIANT, _file(4), sign_record(move, generate_key()))


def _break_fork(world: World) -> None:
    """Another move of a trusted key in place of the second one."""
    path = world.log_dir() / _file(2)
    old = read_move(path.read_bytes(), world.policy, "")
    path.chmod(0o644)
    path.write_bytes(sign_record(replace(old, reference=C), world.key))


def _break_prev(world: World) -> None:
    world.store.put_move("tiny", VARIANT, _file(4), _forge(world, prev="0" * 64))


def _break_no_prev(world: World) -> None:
    world.store.put_move("tiny", VARIANT, _file(4), _forge(world, prev=None))


def _break_name(world: World) -> None:
    """A good move of another recipe."""
    other = replace(A, name="other")
    world.store.put_move("tiny", VARIANT, _file(4), _forge(world, reference=other))


def _break_type(world: World) -> None:
    newest = _read(world)
    assert newest is not None
    move = replace(newest, reference=A, seq=4, prev=newest.sha256)
    data = sign_envelope(rfc8785.dumps(move.to_json()), YANK_TYPE, world.key)
    world.store.put_move("tiny", VARIANT, _file(4), data)


def _break_field(world: World) -> None:
    newest = _read(world)
    assert newest is not None
    move = replace(newest, reference=A, seq=4, prev=newest.sha256)
    payload = rfc8785.dumps({**move.to_json(), "expires": "2030-01-01T00:00:00Z"})
    world.store.put_move("tiny", VARIANT, _file(4), sign_envelope(payload, MOVE_TYPE, world.key))


def _break_spaces(world: World) -> None:
    newest = _read(world)
    assert newest is not None
    move = replace(newest, reference=A, seq=4, prev=newest.sha256)
    payload = json.dumps(move.to_json(), indent=1).encode()
    world.store.put_move("tiny", VARIANT, _file(4), sign_envelope(payload, MOVE_TYPE, world.key))


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (_break_replayed, "is move 1 of"),
        (_break_swapped, "is move 1 of"),
        (_break_gap, "is missing"),
        (_break_beginning, "is missing"),
        (_break_bit, "does not match its content|cannot be read"),
        (_break_rubbish, "not a DSSE envelope"),
        (_break_other_card, "somebody put it here"),
        (_break_other_channel, "somebody put it here"),
        (_break_other_key, "is not trusted here"),
        (_break_fork, "was exchanged"),
        (_break_prev, "was exchanged"),
        (_break_no_prev, "which move it follows"),
        (_break_name, "somebody put it here"),
        (_break_type, "wanted application"),
        (_break_field, "'expires'"),
        (_break_spaces, "canonical"),
    ],
    ids=lambda value: value.__name__.removeprefix("_break_") if callable(value) else "",
)
def test_a_log_that_was_touched_is_refused(world: World, breaking: Any, message: str) -> None:
    for reference in (A, B, C):
        world.move(reference)
    breaking(world)
    with pytest.raises(UntrustedError, match=message):
        _read(world)
    with pytest.raises(UntrustedError):
        world.move(B)  # nor does anybody build on it


def test_a_restart_gives_up_what_cannot_be_believed(world: World) -> None:
    for reference in (A, B):
        world.move(reference)
    _break_rubbish_at(world, 3)
    move = world.move(C, restart=True)
    assert (move.seq, move.restart) == (4, True)
    assert _read(world) == move
    log = read_log(world.store, world.policy, "tiny", VARIANT, "stable", CARD)
    assert [move.reference for move in log.moves] == [C]
    following = world.move(A)
    assert (following.seq, following.prev, following.restart) == (5, move.sha256, False)
    assert _read(world) == following


def _break_rubbish_at(world: World, seq: int) -> None:
    world.store.put_move("tiny", VARIANT, _file(seq), b"rubbish")


def test_a_restart_of_a_good_log_is_an_ordinary_move(world: World) -> None:
    first = world.move(A)
    second = world.move(B, restart=True)
    assert (second.restart, second.prev) == (False, first.sha256)


def test_moves_of_a_revoked_key_count_no_more(world: World) -> None:
    world.move(A)
    revoked = TrustPolicy(keys=world.policy.keys, revoked_keys=(world.key.public.keyid,))
    with pytest.raises(UntrustedError, match="is revoked"):
        _read(world, policy=revoked)


def test_nobody_signs_a_move_that_readers_would_refuse(world: World) -> None:
    builder = generate_key()
    keys = (*world.policy.keys, trusted(builder, "builds", name="builder"))
    with pytest.raises(UntrustedError, match="may not sign channels"):
        world.move(A, key=builder, policy=TrustPolicy(keys=keys))
    assert not world.log_dir().exists()


def test_a_policy_without_the_right_lets_those_with_another_right_move_channels(
    world: World,
) -> None:
    judge, nobody = generate_key(), generate_key()
    old = TrustPolicy(
        keys=(trusted(judge, "verdicts", name="judge"), trusted(nobody, name="nobody"))
    )
    move = world.move(A, key=judge, policy=old)
    assert _read(world, policy=old) == move
    with pytest.raises(UntrustedError, match="may not sign channels"):
        world.move(B, key=nobody, policy=old)
    strict = TrustPolicy(keys=(*old.keys, trusted(generate_key(), "channels", name="release")))
    with pytest.raises(UntrustedError, match="may not sign channels, only verdicts"):
        _read(world, policy=strict)


def test_a_move_decided_on_an_older_log_is_a_conflict(world: World) -> None:
    first = world.move(A)
    world.move(B, actor="eve")
    with pytest.raises(ConflictError, match=r"eve moved stable of .* to tiny/.*:2\.0-b"):
        world.move(C, seen=first)
    assert world.move(B, seen=first).seq == 2  # where it points is where it was to go


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[2J", "x" * 501])
def test_texts_for_people_fit_a_terminal(world: World, text: str) -> None:
    with pytest.raises(RecipeError, match="reason"):
        Author(key=world.key, actor="ada", reason=text)


def test_names_that_no_move_has_hide_none(world: World) -> None:
    for number in ("9", "000000", "0000009", "1234567890"):
        world.store.put_move("tiny", VARIANT, f"stable.{CARD}.{number}.dsse.json", b"rubbish")
    world.store.put_move("tiny", VARIANT, "notes.json", b"rubbish")
    move = world.move(A)
    assert move.seq == 1
    assert _read(world) == move
