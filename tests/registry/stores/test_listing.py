"""What list and show see on every store, and how little they ask for it."""

from __future__ import annotations

import http.client
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.registry.inventory import entries, entry
from pipeline.registry.stores.oci.address import statement_tag, version_tag
from pipeline.registry.stores.publication import WritableStore, pack, unpack
from pipeline.registry.trust.signing import generate_key
from pipeline.registry.trust.verification import Terms
from tests.registry.packages import place_of
from tests.registry.stores.oci.server import FakeRegistry
from tests.registry.team import CARD, Team


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def team(tmp_path: Path, store: WritableStore) -> Team:
    (tmp_path / "work").mkdir()
    return Team(dir=tmp_path / "work", store=store)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of any server, by urllib3 and all that uses it."""
    found: list[str] = []
    put = http.client.HTTPConnection.putrequest

    def counted(self: Any, method: str, url: str, *args: Any, **more: Any) -> None:
        found.append(f"{method} {url}")
        put(self, method, url, *args, **more)

    monkeypatch.setattr(http.client.HTTPConnection, "putrequest", counted)
    return found


def terms(team: Team) -> Terms:
    return Terms(policy=team.policy)


def test_each_version_is_listed_with_what_is_true_of_it(team: Team) -> None:
    good, yanked, foreign = (
        team.publish(b"good", "accepted"),
        team.publish(b"yanked"),
        team.seal(),
    )
    team.enter(good)
    team.yank(yanked)
    team.store.put_package(foreign, [], lambda _: None)
    team.test(foreign, "accepted", key=generate_key())
    found = {one.place: one for one in entries(team.store, terms(team))}
    one = found[place_of(good)]
    assert one.resolved is not None
    assert one.resolved.proof(CARD) is not None
    assert [(held.name, held.card) for held in one.channels] == [("stable", CARD)]
    marked = found[place_of(yanked)]
    assert marked.resolved is not None
    assert marked.resolved.yank is not None
    forged = found[place_of(foreign)]
    assert (forged.resolved, forged.corrupt) == (None, False)
    assert "no trusted key" in forged.fault
    shown = entry(team.store, f"tiny:{place_of(yanked).version}", terms(team))
    assert (shown.resolved, shown.channels) == (marked.resolved, ())


def test_a_damaged_manifest_is_marked(tmp_path: Path, folder_store: WritableStore) -> None:
    (tmp_path / "work").mkdir()
    team = Team(dir=tmp_path / "work", store=folder_store)
    team.publish()
    (path,) = Path(team.store.url).rglob("manifest.json")
    path.chmod(0o644)
    path.write_bytes(b"{}")
    (found,) = entries(team.store, terms(team))
    assert (found.resolved, found.corrupt) == (None, True)


def test_a_list_asks_once_for_each_variant_and_then_for_nothing_but_what_is_new(
    team: Team, asked: list[str]
) -> None:
    packages = [team.publish(bytes([number]), "accepted") for number in range(4)]
    team.enter(packages[0])
    asked.clear()
    first = entries(team.store, terms(team))
    assert len(asked) <= 8  # of 17 documents: what there is, its copies, the registry's identity
    asked.clear()
    assert entries(team.store, terms(team)) == first
    assert len(asked) <= 5  # a catalog, two lists of tags, twice the identity
    assert not any("copies" in one for one in asked)
    team.test(packages[0], "regression")
    team.yank(packages[1])
    found = {one.place: one.resolved for one in entries(team.store, terms(team))}
    regressed, yanked = found[place_of(packages[0])], found[place_of(packages[1])]
    assert regressed is not None
    assert regressed.proof(CARD) is None
    assert yanked is not None
    assert yanked.yank is not None


def swapped(copies: bytes) -> bytes:
    found = unpack(copies)
    return pack(dict(zip(found, reversed(found.values()), strict=True)))


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "lost": lambda copies: b"",
    "rubbish": lambda copies: b"[" * 100_000,
    "no text": lambda copies: b'{"a": 1, "": "x"}',
    "none signed": lambda copies: copies.replace(b"sig", b"sog"),
    "swapped": swapped,
    "too long": lambda copies: b" " * (3 << 20),
}


@pytest.mark.parametrize("how", SPOILED)
def test_copies_prove_nothing_wherever_they_come_from(team: Team, cache: Path, how: str) -> None:
    package = team.publish(verdict="accepted")
    team.enter(package)
    first = entries(team.store, terms(team))
    place = place_of(package)
    copies = [path for path in cache.rglob("*.json")]
    there = team.store.read_copies(place.name, place.variant)
    assert (there is None) == (not copies) == team.store.local
    for path in copies:
        path.write_bytes(SPOILED[how](path.read_bytes()))
    if there is not None:
        team.store.put_copies(place.name, place.variant, SPOILED[how](there))
    assert entries(team.store, terms(team)) == first


def test_who_may_push_hides_no_statement_from_a_list(
    memory_oci: FakeRegistry, tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    team = Team(dir=tmp_path / "work", store=memory_oci.store())
    package = team.publish()
    team.yank(package)
    place = place_of(package)
    (yank,) = (one for one in team.store.read_statements(place) if one.kind == "yank")
    team.store.put_copies(place.name, place.variant, b"")
    rubbish = memory_oci.manifests["engines/tiny", version_tag(place)]
    memory_oci.manifests["engines/tiny", statement_tag(place, yank.name)] = rubbish
    (found,) = entries(memory_oci.store(), terms(team))
    assert found.resolved is not None
    assert found.resolved.yank is not None
