"""What a collection removes, and what it never does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.core.values import Package
from pipeline.registry import gc
from pipeline.registry.gc import DAY_S, Collected, Rules, collect
from pipeline.registry.reference import reference_of
from pipeline.registry.store import WritableStore
from pipeline.registry.trust.channels import move_channel
from tests.registry.packages import place_of
from tests.registry.trust.conftest import CARD, Team


class LaterStore:
    """A store whose clock is ahead, as after so many days."""

    def __init__(self, store: WritableStore, days: float) -> None:
        self.store, self.days = store, days

    def now_s(self) -> float:
        return self.store.now_s() + self.days * DAY_S

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)


def later(team: Team, days: float = 90, **rules: object) -> Collected:
    store: WritableStore = LaterStore(team.store, days)  # type: ignore[assignment]  # delegates
    delete = bool(rules.pop("delete", False))
    return collect(store, team.policy, Rules(**rules), delete=delete)  # type: ignore[arg-type]


def going(done: Collected) -> list[str]:
    return [fate.place.version[:3] for fate in done.fates if fate.remove]


def versions(team: Team, *numbers: str) -> list[Package]:
    return [team.publish(recipe_version=number) for number in numbers]


def move(team: Team, package: Package, channel: str = "candidate") -> None:
    move_channel(
        team.store,
        reference_of(package),
        channel=channel,
        card=CARD,
        author=team.author,
        policy=team.policy,
    )


def test_what_no_channel_needs_goes_and_two_packages_of_a_channel_stay(
    team: Team,
) -> None:
    one, two, three, four = versions(team, "1.0", "2.0", "3.0", "4.0")
    for package in (one, two, three):
        move(team, package)
    done = later(team, delete=True)
    assert list(done.removed) == [place_of(one), place_of(four)]
    assert done.freed_bytes > 0
    assert team.store.places() == [place_of(two), place_of(three)]


def test_a_version_that_a_channel_took_meanwhile_stays(
    team: Team,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (package,) = versions(team, "1.0")
    decide = gc._decide
    looks: list[object] = []

    def promoted_after_the_first_look(*arguments: object) -> object:
        fate = decide(*arguments)  # type: ignore[arg-type]
        if not looks:
            move(team, package)
        looks.append(fate)
        return fate

    monkeypatch.setattr(gc, "_decide", promoted_after_the_first_look)
    assert later(team, delete=True).removed == ()
    assert team.store.places() == [place_of(package)]


def test_files_go_in_a_later_collection_and_not_before_a_day(team: Team) -> None:
    versions(team, "1.0")
    assert later(team, delete=True).leftovers == ()
    root = Path(team.store.url, "tiny")
    assert list(root.rglob("model.plan"))
    assert collect(team.store, team.policy, Rules(), delete=True).leftovers == ()
    assert list(root.rglob("model.plan"))
    for path in root.rglob("*"):
        then = path.lstat().st_mtime - 2 * DAY_S
        os.utime(path, (then, then))
    assert len(collect(team.store, team.policy, Rules(), delete=True).leftovers) == 1
    assert not list(root.rglob("model.plan"))
