"""Trust on every kind of store: what others add to it changes nothing for those who verify."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.core.errors import ConflictError
from pipeline.core.values import Package
from pipeline.registry.promotion import channels_of
from pipeline.registry.stores.publication import WritableStore
from tests.registry.team import CARD, Team


@pytest.fixture
def team(store: WritableStore, tmp_path: Path) -> Team:
    (tmp_path / "work").mkdir()
    return Team(dir=tmp_path / "work", store=store)


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
