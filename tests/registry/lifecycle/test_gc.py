"""What a collection removes, and what it never does."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.values import Reference
from pipeline.registry.lifecycle import evidence, gc
from pipeline.registry.lifecycle.gc import DAY_S, Collected, Rules, collect
from pipeline.registry.stores.store import Place
from tests.registry.lifecycle.conftest import CARD, VARIANT

World = Any


def _gc(world: World, *, delete: bool = False, **rules: Any) -> Collected:
    return collect(world.store, world.policy, Rules(**rules), delete=delete)


def _old(world: World, *versions: str, days: float = 90) -> list[Reference]:
    references = [world.publish(version) for version in versions]
    for reference in references:
        world.age(reference, days)
    return references


def _going(done: Collected) -> list[str]:
    return [fate.place.version.split("-")[0] for fate in done.fates if fate.remove]


def _held(world: World) -> list[str]:
    return [version.split("-")[0] for version in world.store.versions("tiny", VARIANT)]


def _why(done: Collected, version: str) -> str:
    return next(fate.why for fate in done.fates if fate.place.version.startswith(version))


def test_nothing_is_removed_unless_told(world: World) -> None:
    _old(world, "1.0")
    done = _gc(world)
    assert _going(done) == ["1.0"]
    assert (done.removed, done.freed_bytes) == ((), 0)
    assert _held(world) == ["1.0"]


def test_what_no_channel_needs_and_nobody_spoke_of_lately_goes(world: World) -> None:
    one, two, three, four = _old(world, "1.0", "2.0", "3.0", "4.0")
    for reference in (one, two, three):
        world.move(reference)
    done = _gc(world, delete=True)
    assert [place.version for place in done.removed] == [one.version, four.version]
    assert _held(world) == ["2.0", "3.0"]
    assert done.freed_bytes > sum(fate.size_bytes or 0 for fate in done.fates if fate.remove)
    assert _why(done, "3.0") == f"stable of {CARD} points to it"
    assert _why(done, "2.0") == f"stable of {CARD} pointed to it before"
    left = sorted(path.name for path in (Path(world.store.url) / "tiny" / VARIANT).iterdir())
    assert not [name for name in left if name.startswith(("1.0", "4.0"))]


def test_more_or_less_of_the_past_is_kept_on_demand(world: World) -> None:
    for reference in _old(world, "1.0", "2.0", "3.0"):
        world.move(reference)
    assert _going(_gc(world, history=3)) == []
    assert _going(_gc(world, history=1)) == ["1.0", "2.0"]


def test_the_past_counts_packages_not_moves(world: World) -> None:
    one, two, three = _old(world, "1.0", "2.0", "3.0")
    for reference in (one, two, three, two, three, two):
        world.move(reference)
    assert _going(_gc(world)) == ["1.0"]
    assert _going(_gc(world, history=3)) == []


def test_the_young_stay(world: World) -> None:
    _old(world, "1.0", days=31)
    _old(world, "2.0", days=29)
    assert _going(_gc(world)) == ["1.0"]
    assert _going(_gc(world, keep_days=3)) == ["1.0", "2.0"]
    assert "29.0 days ago" in _why(_gc(world), "2.0")


def test_grace_holds_whatever_is_asked(world: World) -> None:
    _old(world, "1.0", days=0.9)
    _old(world, "2.0", days=1.1)
    assert _going(_gc(world, keep_days=0, history=1, damaged=True)) == ["2.0"]


@pytest.mark.parametrize("ahead_days", [-400, 400])
def test_ages_are_by_the_clock_of_the_file_system(
    world: World, monkeypatch: pytest.MonkeyPatch, ahead_days: float
) -> None:
    _old(world, "1.0", days=31)
    _old(world, "2.0", days=29)
    leftover = Path(world.store.url) / ".staging" / "another-machine"
    leftover.mkdir(parents=True)
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real + ahead_days * DAY_S)
    done = _gc(world, delete=True)
    assert _going(done) == ["1.0"]
    assert done.leftovers == ()
    world.publish("3.0")  # sweeps what dead runs left
    assert leftover.is_dir()


def test_a_new_word_about_an_old_version_keeps_it(world: World) -> None:
    (reference,) = _old(world, "1.0")
    world.store.put_statement(Place.of(reference), "lease-1", {"lease.txt": b"ada"})
    assert _going(_gc(world)) == []


def test_pins_stay(world: World) -> None:
    one, _ = _old(world, "1.0", "2.0")
    assert _going(_gc(world, pins=frozenset({Place.of(one)}))) == ["2.0"]


def test_unsigned_pointers_of_old_registries_keep_what_they_name(world: World) -> None:
    (reference,) = _old(world, "1.0")
    pointer = json.dumps({"schema": 1, "version": reference.version}).encode()
    world.store.put_channel("tiny", VARIANT, f"candidate.{CARD}.json", pointer)
    world.store.put_channel("tiny", VARIANT, "odd.json", b"\xff")
    done = _gc(world)
    assert _going(done) == []
    assert _why(done, "1.0").endswith("points to it, unsigned")


def test_an_edited_pointer_beside_a_log_keeps_nothing(world: World) -> None:
    one, two = _old(world, "1.0", "2.0")
    world.move(two)
    file = f"stable.{CARD}.json"
    world.store.put_channel(
        "tiny", VARIANT, file, world.pointer().replace(two.version.encode(), one.version.encode())
    )
    assert _going(_gc(world)) == ["1.0"]


def test_a_log_that_cannot_be_believed_keeps_its_whole_variant(world: World) -> None:
    one, _ = _old(world, "1.0", "2.0")
    world.move(one)
    world.store.put_move("tiny", VARIANT, f"stable.{CARD}.000002.dsse.json", b"rubbish")
    world.publish(name="other")
    world.age(replace(one, name="other"), 90)
    done = _gc(world, delete=True)
    assert [str(place) for place in done.removed] == [f"other/{VARIANT}:{one.version}"]
    assert len(done.faults) == 1
    assert "not a DSSE envelope" in done.faults[0]


def test_what_tells_no_age_stays(world: World) -> None:
    reference = world.publish(verdict=None, signed=False)
    assert _going(_gc(world, keep_days=0)) == []
    assert _why(_gc(world), reference.version) == "no statement tells how old it is"


@pytest.mark.parametrize("damage", ["edited", "not JSON", "another place"])
def test_damaged_versions_are_named_and_go_only_when_told(world: World, damage: str) -> None:
    one, two = _old(world, "1.0", "2.0")
    root = Path(world.store.url) / "tiny" / VARIANT
    path = root / one.version / "manifest.json"
    data = {
        "edited": path.read_bytes().replace(b"trtrtx", b"nothing"),
        "not JSON": b"{",
        "another place": (root / two.version / "manifest.json").read_bytes(),
    }
    path.chmod(0o644)
    path.write_bytes(data[damage])
    done = _gc(world, delete=True)
    assert _held(world) == ["1.0"]
    assert "it is damaged" in _why(done, "1.0")
    assert done.fates[0].damage
    assert _gc(world, delete=True, damaged=True).removed == (Place.of(one),)


def test_a_damaged_version_that_a_channel_needs_stays(world: World) -> None:
    (reference,) = _old(world, "1.0")
    world.move(reference)
    (Path(world.store.url) / "tiny" / VARIANT / reference.version / "manifest.json").unlink()
    assert _going(_gc(world, damaged=True)) == []


def test_each_version_is_judged_again_right_before_it_goes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = _old(world, "1.0", "2.0", "3.0")
    real = gc._judge

    def judged(store: Any, place: Place, *rest: Any) -> Any:
        fate = real(store, place, *rest)
        if place == Place.of(one):  # promoted, and tested again, after the first look
            world.move(one)
        if place == Place.of(two):
            world.store.put_statement(place, "test-2", {"report.json": b"{}"})
        return fate

    monkeypatch.setattr(gc, "_judge", judged)
    done = _gc(world, delete=True)
    assert done.removed == (Place.of(three),)
    assert "points to it" in _why(done, "1.0")
    assert "something was said" in _why(done, "2.0")


def test_what_somebody_else_removed_meanwhile_is_no_fault(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = _old(world, "1.0", "2.0")
    real = evidence.manifest_at

    def gone(store: Any, place: Place) -> Any:
        shutil.rmtree(store.location(Place.of(one)), ignore_errors=True)
        return real(store, place)

    monkeypatch.setattr("pipeline.registry.lifecycle.gc.manifest_at", gone)
    assert _gc(world, delete=True).removed == (Place.of(two),)


def test_leftovers_are_named_and_go_when_told(world: World) -> None:
    (reference,) = _old(world, "1.0", days=3)
    root = Path(world.store.url) / "tiny" / VARIANT
    shutil.rmtree(root / reference.version)
    world.age(reference, 3)
    beside = root / f"{reference.version}.statements"
    os.utime(beside, (1_000, 1_000))
    assert len(_gc(world).leftovers) == 1
    assert beside.is_dir()
    assert reference.version in _gc(world, delete=True).leftovers[0]
    assert not beside.exists()
