"""Which versions gc removes, on a registry in a folder whose clock is ahead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.registry import inventory
from pipeline.registry.inventory import DAY_S, Collected, collect
from tests.registry.packages import place_of
from tests.registry.team import Team


class Later:
    """The store, some days from now by its own clock."""

    def __init__(self, store: Any, days: float) -> None:
        self.store, self.days = store, days

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def now_s(self) -> float:
        now_s: float = self.store.now_s()
        return now_s + self.days * DAY_S


def run(team: Team, days: float, *, delete: bool = True, **rules: Any) -> Collected:
    later: Any = Later(team.store, days)
    return collect(later, team.policy, delete=delete, **rules)


def test_what_no_channel_needs_goes_when_it_is_old_and_nothing_goes_before(team: Team) -> None:
    plans = (b"one", b"two", b"three", b"four")
    one, two, three, loose = [team.publish(plan, "accepted") for plan in plans]
    for package in (one, two, three):
        team.enter(package)
    assert not any(fate.remove for fate in run(team, 29).fates)
    looked = run(team, 31, delete=False)
    assert {fate.place for fate in looked.fates if fate.remove} == {
        place_of(one),
        place_of(loose),
    }
    assert looked.removed == ()
    assert len(team.store.places()) == 4
    done = run(team, 31)
    assert set(done.removed) == {place_of(one), place_of(loose)}
    assert team.store.places() == sorted([place_of(two), place_of(three)])


@pytest.mark.parametrize("days", [0.0, 0.9])
def test_a_day_of_grace_holds_whatever_is_asked(team: Team, days: float) -> None:
    team.publish()
    assert run(team, days, keep_days=0.0).removed == ()


def test_what_tells_no_age_stays(team: Team) -> None:
    team.store.put_package(team.seal(b"unsigned"), [], lambda _: None)
    (fate,) = run(team, 1000).fates
    assert (fate.remove, fate.why[:14]) == (False, "no trusted key")


def test_a_damaged_version_goes_only_when_asked_for(team: Team) -> None:
    package = team.publish()
    (path,) = Path(team.store.url).rglob("manifest.json")
    path.chmod(0o644)
    path.write_bytes(b"{}")
    assert run(team, 1000).removed == ()
    assert run(team, 1000, damaged=True).removed == (place_of(package),)


def test_a_yank_is_a_statement_that_keeps_a_version(team: Team) -> None:
    package = team.publish()
    team.yank(package)
    assert run(team, 29).removed == ()
    assert run(team, 31).removed == (place_of(package),)


def test_a_version_that_a_channel_took_meanwhile_stays(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = team.publish(verdict="accepted")
    decide = inventory._decide
    looks: list[object] = []

    def promoted_after_the_first_look(*arguments: Any) -> object:
        fate = decide(*arguments)
        if not looks:
            team.enter(package)
        looks.append(fate)
        return fate

    monkeypatch.setattr(inventory, "_decide", promoted_after_the_first_look)
    assert run(team, 90).removed == ()
    assert team.store.places() == [place_of(package)]


def test_files_go_in_a_later_collection_and_not_before_a_day(team: Team) -> None:
    team.publish()
    root = Path(team.store.url, "tiny")
    assert run(team, 90).leftovers == ()
    assert run(team, 0).leftovers == ()
    assert list(root.rglob("model.plan"))
    for path in root.rglob("*"):
        then = path.lstat().st_mtime - 2 * DAY_S
        os.utime(path, (then, then))
    assert len(run(team, 0).leftovers) == 1
    assert not list(root.rglob("model.plan"))
