"""Trust on every kind of store: what others add to it changes nothing for those who verify."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core.errors import ConflictError, UntrustedError
from pipeline.core.values import Package
from pipeline.registry.promotion import channels_of
from pipeline.registry.reference import reference_of
from pipeline.registry.resolve import resolve
from pipeline.registry.store import ENVELOPE, RawStatement
from pipeline.registry.stores.publication import WritableStore
from pipeline.registry.trust.signing import generate_key, place_fields, sign_package, sign_statement
from pipeline.registry.trust.verification import Terms
from tests.registry.packages import place_of, raw_statement
from tests.registry.team import CARD, Team


@pytest.fixture
def team(store: WritableStore, tmp_path: Path) -> Team:
    (tmp_path / "work").mkdir()
    return Team(dir=tmp_path / "work", store=store)


def add_junk(team: Team, package: Package, good: RawStatement) -> None:
    """Everything that add rights allow to one who has read all that is signed."""
    stranger = generate_key()
    fields = {
        "registry": team.store.identity(),
        **place_fields(reference_of(package)),
        "yanked": True,
        "actor": "eve",
        "reason": "spite",
    }
    yank = sign_statement("yank", package.digest, fields, stranger)
    elsewhere = sign_statement(
        "yank", package.digest, {**fields, "registry": "f" * 32}, team.releaser
    )
    move = {**fields, "channel": "stable", "card": CARD, "predecessor": None}
    for raw in (
        yank,
        elsewhere,
        sign_package(package, stranger),
        raw_statement("yank"),
        raw_statement("test"),
        replace(good, name="test-" + "0" * 16),
        replace(good, name="test-" + "f" * 16),
    ):
        team.store.put_statement(place_of(package), raw)
    for fault in (b"rubbish", b"x" * 70_000):
        team.store.put_move("tiny", place_of(package).variant, fault)
    for registry, key in ((team.store.identity(), stranger), ("f" * 32, team.releaser)):
        raw = sign_statement("move", package.digest, {**move, "registry": registry}, key)
        team.store.put_move("tiny", place_of(package).variant, raw.files[ENVELOPE])


def test_what_others_add_to_a_store_changes_nothing(team: Team) -> None:
    good, other = team.publish(b"good", "accepted"), team.publish(b"other", "accepted")
    team.enter(good, card=CARD)
    before = team.examine(other)
    old = team.test(other, "accepted")
    team.test(other, "regression")
    add_junk(team, other, old)
    done = team.examine(other)
    assert done.signer == before.signer
    assert done.yank is None
    assert done.proof(CARD) is None  # the replayed result outranks nothing
    assert resolve(team.store, "tiny", Terms(policy=team.policy)).package.digest == good.digest
    team.test(other, "accepted")
    team.enter(other, card=CARD)
    assert resolve(team.store, "tiny", Terms(policy=team.policy)).package.digest == other.digest
    team.releasing().rollback("tiny", "stable")
    assert resolve(team.store, "tiny", Terms(policy=team.policy)).package.digest == good.digest


def test_a_yank_counts_and_is_undone_beside_junk(team: Team) -> None:
    package = team.publish(verdict="accepted")
    add_junk(team, package, team.test(package, "accepted"))
    for _ in range(2):
        assert team.yank(package)[1]
        with pytest.raises(UntrustedError, match="yanked by ada"):
            team.examine(package)
        assert team.yank(package, undo=True)[1]
        assert team.examine(package).yank is None


def test_simultaneous_promoters_leave_one_channel_that_every_reader_sees_alike(team: Team) -> None:
    packages = [team.publish(plan, "accepted") for plan in (b"one", b"two")]

    def job(package: Package) -> Callable[[], bool]:
        def run() -> bool:
            try:
                team.enter(package, card=CARD)
            except ConflictError:
                return False
            return True

        return run

    with ThreadPoolExecutor(8) as pool:
        landed = list(pool.map(lambda run: run(), [job(one) for one in packages * 4]))
    assert any(landed)
    ((_, _, channel),) = channels_of(team.store, team.policy, "tiny")
    assert channel.newest.reference.digest in {one.digest for one in packages}
    team.enter(packages[0], card=CARD)
    ((_, _, channel),) = channels_of(team.store, team.policy, "tiny")
    assert channel.newest.reference.digest == packages[0].digest
