"""Uploads that were interrupted, claims of the living and the dead, and removal beside them."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import (
    ConflictError,
    TransientError,
)
from pipeline.core.values import Package
from pipeline.registry.stores.s3 import S3Store, connection
from pipeline.registry.stores.s3.crc32 import combined
from tests.registry.stores.s3_packages import (
    SIGNATURES,
    age_everything,
    assert_whole,
    keys,
    place_of,
    sealed,
)
from tests.registry.stores.s3_server import (
    Handler,
    MemoryS3,
    reset,
)

Bench = Any


@pytest.fixture
def interrupted(
    store: S3Store, memory: MemoryS3, package: Package, monkeypatch: pytest.MonkeyPatch
) -> S3Store:
    """A store where a run died with two of three parts sent, and its claim stands."""
    monkeypatch.setattr(connection, "_ATTEMPTS", 1)
    memory.fail("PUT", "partNumber=3", reset)
    with pytest.raises(TransientError):
        store.put_package(package, SIGNATURES)
    assert any(key.endswith(".claim") for key in keys(store))
    assert len(memory.uploads) == 1
    return S3Store(url=store.url, part_bytes=store.part_bytes)


def test_next_run_sends_only_what_is_missing(
    interrupted: S3Store, memory: MemoryS3, package: Package
) -> None:
    sent: list[int] = []
    assert interrupted.put_package(package, SIGNATURES, sent.append)
    assert_whole(interrupted, package)
    assert memory.count("PUT", "partNumber=1") == memory.count("PUT", "partNumber=2") == 1
    assert max(sent) <= 1 << 20  # the third part has one MiB
    assert memory.count("PUT", "partNumber=3") == 2


def test_parts_of_other_bytes_are_not_kept(
    interrupted: S3Store, memory: MemoryS3, package: Package
) -> None:
    (upload,) = memory.uploads.values()
    upload.parts[2] = bytes(len(upload.parts[2]))
    assert interrupted.put_package(package, {})
    assert_whole(interrupted, package)


def test_run_with_parts_of_another_size_begins_anew_and_clears_up(
    interrupted: S3Store, memory: MemoryS3, package: Package
) -> None:
    assert S3Store(url=interrupted.url, part_bytes=6 << 20).put_package(package, {})
    assert_whole(interrupted, package)
    assert memory.uploads == {}


def test_living_claim_keeps_other_bytes_out(
    interrupted: S3Store, bench: Bench, tmp_path: Path, package: Package
) -> None:
    with pytest.raises(ConflictError, match="is being published with other bytes"):
        interrupted.put_package(sealed(bench, tmp_path / "other", seed=2), {})
    assert interrupted.put_package(package, {})
    assert_whole(interrupted, package)


def test_dead_claim_is_taken_over_and_nothing_of_it_stays(
    interrupted: S3Store, memory: MemoryS3, bench: Bench, tmp_path: Path, package: Package
) -> None:
    place = place_of(package)
    bucket = interrupted._bucket()
    bucket.write(f"{bucket.address.version(place)}/engine/only-of-the-first", b"x")
    bucket.write(f"{bucket.address.version(place)}/engine/tokenizer/tokenizer.json", b"[]")
    age_everything(memory)
    other = sealed(bench, tmp_path / "other", seed=2)
    assert interrupted.put_package(other, {})
    assert_whole(interrupted, other)
    assert {key for key in keys(interrupted) if "statement" not in key} == {
        f"tiny/{place.variant}/{place.version}/{file}"
        for file in ("manifest.json", "engine/model.plan", "engine/tokenizer/tokenizer.json")
    }
    with pytest.raises(ConflictError):
        interrupted.put_package(package, {})


def test_publisher_whose_claim_was_taken_over_stops_before_its_manifest(
    store: S3Store, memory: MemoryS3, bench: Bench, tmp_path: Path, package: Package
) -> None:
    other = sealed(bench, tmp_path / "other", seed=2)

    def take_over(handler: Handler) -> bool:
        age_everything(memory)
        assert S3Store(url=store.url, part_bytes=store.part_bytes).put_package(other, {})
        return False

    memory.fail("PUT", "partNumber=2", take_over)
    with pytest.raises(ConflictError):
        store.put_package(package, {})
    assert_whole(store, other)


def test_leftovers_are_told_and_removed_only_when_asked_and_old(
    interrupted: S3Store, memory: MemoryS3, package: Package
) -> None:
    place = place_of(package)
    version = f"tiny/{place.variant}/{place.version}"
    before = keys(interrupted)
    assert interrupted.leftovers(3600.0, delete=True) == []
    assert keys(interrupted) == before
    found = interrupted.leftovers(0.0, delete=False)
    assert keys(interrupted) == before
    assert [line.partition(" (")[0] for line in found] == [version, f"{version}/engine/model.plan"]
    age_everything(memory)
    assert interrupted.leftovers(3600.0, delete=True) == found
    assert keys(interrupted) == set()
    assert interrupted.leftovers(0.0, delete=True) == []


def test_leftovers_never_touch_what_is_published(
    store: S3Store, memory: MemoryS3, package: Package
) -> None:
    store.put_package(package, SIGNATURES)
    store.put_channel("tiny", place_of(package).variant, "stable.card.json", b"{}")
    store.put_move("tiny", place_of(package).variant, "stable.card.000001.dsse.json", b"{}")
    age_everything(memory)
    before = keys(store)
    assert store.leftovers(0.0, delete=True) == []
    assert keys(store) == before


def test_version_that_is_being_removed_is_not_published_meanwhile(
    store: S3Store, memory: MemoryS3, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_package(package, SIGNATURES)
    monkeypatch.setattr(connection, "_ATTEMPTS", 1)
    memory.fail("DELETE", "engine/model.plan", reset)
    remover = S3Store(url=store.url)
    with pytest.raises(TransientError):
        remover.delete_version(place_of(package))
    assert store.versions("tiny", place_of(package).variant) == []
    with pytest.raises(TransientError, match="is being removed"):
        store.put_package(package, {})
    assert remover.delete_version(place_of(package)) > 0  # the next removal completes it
    assert keys(store) == set()


def test_version_that_is_being_published_is_not_removed(
    interrupted: S3Store, package: Package
) -> None:
    with pytest.raises(TransientError, match="is being published"):
        interrupted.delete_version(place_of(package))
    assert interrupted.put_package(package, {})


@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_crc_of_a_whole_follows_from_those_of_its_parts(first: bytes, second: bytes) -> None:
    together = combined(zlib.crc32(first), zlib.crc32(second), len(second))
    assert together == zlib.crc32(first + second)
