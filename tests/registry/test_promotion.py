"""Promote, roll back and yank: what is signed, for whom it counts, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.core.errors import NotAcceptedError, RecipeError, UntrustedError
from pipeline.core.published import Package
from pipeline.registry.promotion import Moved, channels_of
from pipeline.registry.reference import reference_of
from pipeline.registry.trust.signing import generate_key
from tests.registry.packages import VARIANT, place_of
from tests.registry.team import CARD, OTHER_CARD, Team


def back(team: Team, text: str = "tiny", channel: str = "stable", **more: Any) -> Moved:
    return team.releasing().rollback(text, channel, **more)


def in_stable(team: Team, *plans: bytes) -> list[Package]:
    packages = [team.publish(plan, "accepted") for plan in plans]
    for package in packages:
        team.enter(package)
    return packages


def pointed(team: Team) -> str:
    ((_, _, channel),) = channels_of(team.store, team.policy, "tiny", "stable")
    return channel.newest.reference.digest


@pytest.mark.parametrize(
    ("channel", "verdict", "enters"),
    [
        ("stable", "accepted", True),
        ("stable", "checked", False),
        ("stable", "compiled", False),
        ("candidate", "accepted", True),
        ("candidate", "checked", True),
        ("candidate", "compiled", True),
        ("nightly", "compiled", True),
        *((channel, verdict, False) for channel in ("candidate", "stable") for verdict in (
            "rejected", "regression", "anomalous", "inconclusive"
        )),
    ],
)  # fmt: skip
def test_a_channel_takes_what_its_verdict_allows(
    team: Team, channel: str, verdict: str, enters: bool
) -> None:
    package = team.publish(verdict=verdict)
    if enters:
        done = team.enter(package, channel)
        assert (done.changed, done.before, done.verdict.verdict) == (True, None, verdict)
        assert not team.enter(package, channel).changed
    else:
        with pytest.raises(NotAcceptedError, match=f"is {verdict}, by"):
            team.enter(package, channel)


@pytest.mark.parametrize("fault", ["none", "stranger's", "another card's"])
def test_without_a_trusted_result_for_the_card_nothing_enters(team: Team, fault: str) -> None:
    package = team.publish()
    if fault == "stranger's":
        team.test(package, "accepted", key=generate_key())
    if fault == "another card's":
        team.test(package, "accepted", card=OTHER_CARD)
    with pytest.raises(UntrustedError, match="no trusted test result"):
        team.enter(package, card=CARD)


def test_of_several_cards_one_must_be_named(team: Team) -> None:
    package = team.publish(verdict="accepted")
    team.test(package, "accepted", card=OTHER_CARD)
    with pytest.raises(RecipeError, match=f"{CARD}, {OTHER_CARD}"):
        team.enter(package)
    for card in (CARD, OTHER_CARD):
        assert team.enter(package, card=card).move.card == card
    with pytest.raises(RecipeError, match=f"{VARIANT} --card {CARD}.*--card {OTHER_CARD}"):
        back(team)


def test_a_yanked_or_unsigned_package_enters_no_channel(team: Team) -> None:
    package = team.publish(verdict="accepted")
    team.yank(package)
    with pytest.raises(UntrustedError, match="yanked"):
        team.enter(package)
    unsigned = team.seal(b"unsigned")
    team.store.put_package(unsigned, [], lambda _: None)
    team.test(unsigned, "accepted")
    with pytest.raises(UntrustedError, match="no trusted key"):
        team.enter(unsigned)


def test_a_rollback_is_a_move_to_the_package_before_and_a_second_one_comes_back(
    team: Team,
) -> None:
    one, two = in_stable(team, b"one", b"two")
    assert back(team).move.reference == reference_of(one)
    assert pointed(team) == one.digest
    back(team)
    assert pointed(team) == two.digest
    team.yank(one)  # what was good enough once must still be
    with pytest.raises(UntrustedError, match="yanked"):
        back(team)
    assert pointed(team) == two.digest


def test_a_yank_needs_a_reason_and_its_undo_a_yank(team: Team) -> None:
    package = team.publish()
    with pytest.raises(RecipeError, match="--reason"):
        team.yank(package, reason="")
    with pytest.raises(RecipeError, match="is not yanked"):
        team.yank(package, reason="", undo=True)


def test_what_is_revoked_or_unsigned_may_still_be_yanked(team: Team) -> None:
    package = team.seal()
    team.store.put_package(package, [], lambda _: None)
    policy = replace(team.policy, revoked_digests=(package.digest,))
    done, changed = team.yank(package, policy=policy)
    assert changed
    assert done.place == place_of(package)


def test_a_key_that_may_not_sign_channels_neither_yanks_nor_promotes(team: Team) -> None:
    with pytest.raises(UntrustedError, match="may not sign channels"):
        team.releasing(key=team.builder)
