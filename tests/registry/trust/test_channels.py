"""Chains of moves: order comes from signatures, and rubbish in a log stops no channel."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from pipeline.core.errors import ConflictError
from pipeline.core.published import Reference
from pipeline.registry.reference import reference_of
from pipeline.registry.store import ENVELOPE
from pipeline.registry.trust.policy import TrustPolicy
from pipeline.registry.trust.signing import generate_key, place_fields, sign_statement
from pipeline.registry.trust.statements import open_statement
from pipeline.registry.trust.verification import Channel, Move, read_channels
from tests.registry.packages import VARIANT
from tests.registry.team import CARD, Team, trusted


@pytest.fixture
def packages(team: Team) -> list[Reference]:
    return [reference_of(team.publish(plan)) for plan in (b"one", b"two", b"three")]


def move(team: Team, reference: Reference, *, seen: Move | None = None, **more: Any) -> Move:
    return team.releasing(**more).move(reference, "stable", CARD, seen=seen)


def channel(team: Team, policy: TrustPolicy | None = None) -> Channel:
    (found,) = read_channels(team.store, policy or team.policy, "tiny", VARIANT)
    assert (found.name, found.card) == ("stable", CARD)
    return found


def stable(team: Team, policy: TrustPolicy | None = None) -> Reference:
    return channel(team, policy).newest.reference


def signed_move(team: Team, reference: Reference, **fields: Any) -> bytes:
    """A move that did not go through a `Releaser`."""
    key = fields.pop("key", team.releaser)
    after = fields.pop("after", "")
    given = {
        "registry": team.store.identity(),
        **place_fields(reference),
        "channel": "stable",
        "card": CARD,
        "predecessor": None,
        "actor": "eve",
        "reason": "",
        **fields,
    }
    return sign_statement("move", reference.digest, given, key, after=after).files[ENVELOPE]


def put(team: Team, reference: Reference, data: bytes) -> None:
    team.store.put_move(reference.name, reference.variant, data)


def test_of_two_successors_the_earlier_signed_counts_and_what_follows_the_other_does_not(
    team: Team, packages: list[Reference]
) -> None:
    one, two, three = packages
    first = move(team, one)
    early = signed_move(team, two, predecessor=first.id)
    late = signed_move(team, three, predecessor=first.id)
    put(team, one, late)
    put(team, one, signed_move(team, one, predecessor=channel(team).newest.id))
    put(team, one, early)
    assert stable(team) == two


def test_an_author_whose_move_was_overtaken_gets_a_conflict(
    team: Team, packages: list[Reference]
) -> None:
    one, two, three = packages
    first = move(team, one)
    rival = signed_move(team, two, predecessor=first.id)

    class Slow:
        """The store; a rival's move, signed before ours, shows only after ours was written."""

        def __getattr__(self, name: str) -> Any:
            return getattr(team.store, name)

        def put_move(self, name: str, variant: str, data: bytes) -> bool:
            written = team.store.put_move(name, variant, data)
            team.store.put_move(name, variant, rival)
            return written

    with pytest.raises(ConflictError, match="eve moved stable"):
        move(team, three, store=Slow())
    assert stable(team) == two


def test_a_decision_about_an_older_state_is_refused(team: Team, packages: list[Reference]) -> None:
    one, two, three = packages
    seen = move(team, one)
    move(team, two)
    with pytest.raises(ConflictError, match="look at it"):
        move(team, three, seen=seen)
    assert stable(team) == two


@pytest.mark.parametrize("seed", range(4))
def test_a_later_rival_of_any_earlier_move_changes_nothing(
    team: Team, packages: list[Reference], seed: int
) -> None:
    chance = random.Random(seed)
    for _ in range(4):
        move(team, chance.choice(packages))
    before = channel(team)
    known = [None, *(one.id for one in before.moves[:-1])]
    for _ in range(12):
        rival = signed_move(team, chance.choice(packages), predecessor=chance.choice(known))
        put(team, packages[0], rival)
        known.append(open_statement(rival, team.policy).id)
    assert channel(team) == before


def test_a_revoked_key_takes_its_moves_out_and_stops_no_channel(
    team: Team, packages: list[Reference]
) -> None:
    one, two, three = packages
    second = generate_key()
    policy = replace(
        team.policy, keys=(*team.policy.keys, trusted(second, "channels", name="second"))
    )
    move(team, one)
    move(team, two, key=second, policy=policy)
    revoked = replace(policy, revoked_keys=(second.public.keyid,))
    assert (stable(team, policy), stable(team, revoked)) == (two, one)
    move(team, three, policy=policy)
    assert stable(team, revoked) == three


def test_a_clock_that_is_behind_moves_a_channel_all_the_same(
    team: Team, packages: list[Reference]
) -> None:
    put(team, packages[0], signed_move(team, packages[0], after="2199-01-01T00:00:00.000000Z"))
    move(team, packages[1])
    move(team, packages[2])
    assert stable(team) == packages[2]
