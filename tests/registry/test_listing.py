"""What list and show see: verified entries, faults that are marked, and little asked twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.registry.inventory import Pointer, entries, entry
from pipeline.registry.trust.signing import generate_key
from pipeline.registry.trust.verification import Terms
from tests.registry.packages import place_of
from tests.registry.team import CARD, Team


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Remote:
    """A store that is far away, and counts what is read of it."""

    local = False

    def __init__(self, store: Any) -> None:
        self.store = store
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.store, name)
        if name not in {"read_manifest", "read_statement", "read_statements"}:
            return found

        def call(*args: Any, **more: Any) -> Any:
            self.calls[name] += 1
            return found(*args, **more)

        return call


def terms(team: Team) -> Terms:
    return Terms(policy=team.policy)


def test_each_version_is_listed_with_what_is_true_of_it(team: Team) -> None:
    good, yanked = team.publish(b"good", "accepted"), team.publish(b"yanked")
    foreign, damaged = team.seal(b"foreign"), team.publish(b"damaged")
    team.enter(good)
    team.yank(yanked)
    team.store.put_package(foreign, [], lambda _: None)
    team.test(foreign, "accepted", key=generate_key())
    path = Path(team.store.url) / "tiny" / place_of(damaged).variant / place_of(damaged).version
    (path / "manifest.json").chmod(0o644)
    (path / "manifest.json").write_bytes(b"{}")
    found = {one.place: one for one in entries(team.store, terms(team))}
    one = found[place_of(good)]
    assert one.resolved is not None
    assert one.resolved.proof(CARD) is not None
    assert one.pointers == (Pointer(channel="stable", card=CARD),)
    marked = found[place_of(yanked)]
    assert marked.resolved is not None
    assert marked.resolved.yank is not None
    forged = found[place_of(foreign)]
    assert (forged.resolved, forged.corrupt) == (None, False)
    assert "no trusted key" in forged.fault
    assert (found[place_of(damaged)].resolved, found[place_of(damaged)].corrupt) == (None, True)


def test_the_second_list_reads_nothing_again_and_sees_what_is_new(team: Team) -> None:
    packages = [team.publish(bytes([number]), "accepted") for number in range(3)]
    remote: Any = Remote(team.store)
    first = entries(remote, terms(team))
    assert remote.calls["read_manifest"] == 3
    remote.calls.clear()
    assert entries(remote, terms(team)) == first
    assert remote.calls == {}
    team.test(packages[0], "regression")
    team.yank(packages[1])
    found = {one.place: one.resolved for one in entries(remote, terms(team))}
    assert remote.calls == {"read_statements": 2}
    regressed, yanked = found[place_of(packages[0])], found[place_of(packages[1])]
    assert regressed is not None
    assert regressed.proof(CARD) is None
    assert yanked is not None
    assert yanked.yank is not None


def test_what_is_remembered_is_verified_again(team: Team, cache: Path) -> None:
    package = team.publish(verdict="accepted")
    remote: Any = Remote(team.store)
    entries(remote, terms(team))
    for path in cache.rglob("*.json"):
        path.chmod(0o600)
        path.write_text(path.read_text().replace("signatures", "signatvres"))
    (found,) = entries(remote, terms(team))
    assert found.place == place_of(package)
    assert found.resolved is None or found.resolved.proof(CARD) is None


def test_show_finds_one_with_its_channels(team: Team) -> None:
    package = team.publish(verdict="accepted")
    team.enter(package)
    team.yank(package)
    found = entry(team.store, "tiny", terms(team))
    assert found.resolved is not None
    assert found.resolved.yank is not None
    assert found.pointers == (Pointer(channel="stable", card=CARD),)
