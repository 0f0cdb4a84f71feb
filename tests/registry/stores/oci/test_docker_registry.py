"""The store on Debian's docker-registry: no referrers API, no conditional writes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipeline.core.errors import (
    ConflictError,
    CorruptError,
    NotFoundError,
    PipelineError,
    TransientError,
)
from pipeline.registry.stores.oci import OciStore, publish, tagged
from pipeline.registry.stores.oci.referrers import list_referrers
from pipeline.registry.stores.oci.upload import upload_stream
from pipeline.registry.stores.opening import open_store
from pipeline.registry.stores.store import Place, WritableStore
from tests.registry.stores.oci.conftest import STATEMENTS, Sealed, put
from tests.services.docker_registry import RunningRegistry

pytestmark = pytest.mark.services


@pytest.fixture(autouse=True)
def _rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writers of one tag need time to see each other."""
    monkeypatch.setattr(tagged, "SETTLE_S", 0.3)


def tags(store: OciStore, sealed: Sealed) -> list[str]:
    return store._repository(sealed.place.name).tags()


def test_a_published_package_is_listed_and_every_byte_comes_back(
    registry: RunningRegistry, sealed: Sealed
) -> None:
    store = open_store(f"{registry.url}/engines/of-us")
    assert isinstance(store, WritableStore)
    store.check_writable()
    assert store.names() == []
    counts: list[int] = []
    assert store.put_package(sealed.package, STATEMENTS, counts.append)
    assert sum(counts) == sum(file.size_bytes for file in sealed.files)

    place = sealed.place
    assert store.names() == [place.name]
    assert store.variants(place.name) == [place.variant]
    assert store.versions(place.name, place.variant) == [place.version]
    assert store.versions(place.name, "other") == []
    assert store.variants("other") == []
    assert hashlib.sha256(store.read_manifest(place)).hexdigest() == sealed.package.digest
    sealed.assert_readable(store)
    assert open_store(f"{registry.url}/engines/of-them").names() == []


def test_the_same_package_again_is_a_success_and_other_bytes_are_a_conflict(
    registry: RunningRegistry, seal_package: Any
) -> None:
    store = registry.store()
    first, other = seal_package(0), seal_package(5)
    assert first.place == other.place
    assert put(store, first)
    assert not put(store, first)
    with pytest.raises(ConflictError, match="other bytes"):
        put(store, other)
    first.assert_readable(registry.store())


def test_statements_are_there_with_the_package_and_are_only_ever_added(
    registry: RunningRegistry, sealed: Sealed
) -> None:
    store = registry.store()
    put(store, sealed)
    assert {one.name for one in store.statements(sealed.place)} == set(STATEMENTS)
    for name, files in STATEMENTS.items():
        assert store.read_statement(sealed.place, name) == files
    assert store.put_statement(sealed.place, "test-1", {"report.json": b"{}"})
    assert not store.put_statement(sealed.place, "test-1", {"report.json": b"{}"})
    with pytest.raises(ConflictError):
        store.put_statement(sealed.place, "test-1", {"report.json": b"[]"})
    newest = store.statements(sealed.place)[0]
    assert (newest.name, newest.sizes) == ("test-1", {"report.json": 2})
    assert abs(newest.made_s - time.time()) < 60
    with pytest.raises(NotFoundError):
        store.read_statement(sealed.place, "test-2")
    with pytest.raises(NotFoundError):
        store.put_statement(Place(name="tiny", variant="any", version="1.0"), "a", {"b": b"c"})
    sealed.assert_readable(store)


def test_many_statements_at_once_all_stay(registry: RunningRegistry, sealed: Sealed) -> None:
    put(registry.store(), sealed)

    def add(number: int) -> bool:
        store = registry.store()
        return store.put_statement(sealed.place, f"test-{number}", {"a": b"%d" % number})

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(add, range(6)))
    names = {one.name for one in registry.store().statements(sealed.place)}
    assert names == {*STATEMENTS, *(f"test-{number}" for number in range(6))}


def test_of_writers_of_one_move_one_wins_and_the_log_keeps_all_moves(
    registry: RunningRegistry,
) -> None:
    variant = "any-checkpoint-fp8"

    def append(number: int) -> bool:
        try:
            registry.store().put_move(
                "tiny", variant, f"stable.A100.{number // 2}.dsse.json", b"%d" % number
            )
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(append, range(6)))
    moves = registry.store().moves("tiny", variant)
    assert len(moves) == 3
    for seq in range(3):
        winners = [n for n in (2 * seq, 2 * seq + 1) if won[n]]
        assert winners == [int(moves[f"stable.A100.{seq}.dsse.json"])]


def test_a_channel_points_and_is_an_image_tag(registry: RunningRegistry, seal_package: Any) -> None:
    store = registry.store()
    first, second = seal_package(0, "1.0"), seal_package(3, "1.1")
    variant = first.place.variant
    for sealed in (first, second):
        put(store, sealed)
        pointer = json.dumps({"version": sealed.place.version}).encode()
        store.put_channel("tiny", variant, "stable.NVIDIA-L4.json", pointer)
        assert store.channels("tiny", variant) == {"stable.NVIDIA-L4.json": pointer}
        assert store.moves("tiny", variant) == {}
        repository = store._repository("tiny")
        pointed = repository.manifest(f"{variant}_stable.NVIDIA-L4")
        assert pointed == repository.manifest(f"{variant}_{sealed.place.version}")
    assert store.versions("tiny", variant) == [first.place.version, second.place.version]
    assert store.channels("tiny", "other") == {}


def test_a_deleted_version_is_gone_with_its_statements_and_can_come_back(
    registry: RunningRegistry, seal_package: Any
) -> None:
    store = registry.store()
    first, second = seal_package(0, "1.0"), seal_package(3, "1.1")
    for sealed in (first, second):
        put(store, sealed)
    assert store.delete_version(first.place) > sum(file.size_bytes for file in first.files)
    assert store.versions("tiny", first.place.variant) == [second.place.version]
    assert store.statements(first.place) == []
    with pytest.raises(NotFoundError):
        store.read_manifest(first.place)
    with pytest.raises(NotFoundError):
        store.delete_version(first.place)
    assert len(tags(store, first)) == 2  # the second version and its statements
    assert store.leftovers(0.0, delete=True) == []
    second.assert_readable(store)
    assert put(store, first)
    first.assert_readable(store)


@pytest.mark.parametrize("fault", ["flip", "truncate", "grow", "missing", "link"])
def test_a_file_that_changed_after_sealing_is_never_published(
    registry: RunningRegistry, sealed: Sealed, fault: str
) -> None:
    path = sealed.package.dir / "engine" / "second.bin"
    data = path.read_bytes()
    path.unlink()
    if fault == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif fault == "truncate":
        path.write_bytes(data[:-1])
    elif fault == "grow":
        path.write_bytes(data + b"\0")
    elif fault == "link":
        path.symlink_to(sealed.package.dir / "engine" / "model.plan")
    with pytest.raises(CorruptError, match=r"second\.bin"):
        put(registry.store(), sealed)
    assert tags(registry.store(), sealed) == []


def test_what_was_uploaded_before_an_interruption_is_not_sent_again(
    registry: RunningRegistry, sealed: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sealed.package.dir / "engine" / "second.bin"
    data = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(CorruptError):
        put(registry.store(), sealed)
    path.write_bytes(data)
    sent: list[int] = []

    def counted(repository: Any, size_bytes: int, *more: Any) -> str:
        sent.append(size_bytes)
        return upload_stream(repository, size_bytes, *more)

    monkeypatch.setattr(publish, "upload_stream", counted)
    assert put(registry.store(), sealed)
    assert len(sent) == 1
    sealed.assert_readable(registry.store())


def test_a_registry_that_crashes_during_a_publish_does_not_end_it(
    registry: RunningRegistry, seal_package: Any
) -> None:
    sealed = seal_package(large_bytes=150 << 20)
    sent = 0
    crashed = threading.Event()

    def crash(count: int) -> None:
        nonlocal sent
        sent += count
        if sent > 100 << 20 and not crashed.is_set():
            crashed.set()
            registry.restart()

    assert registry.store().put_package(sealed.package, STATEMENTS, crash)
    assert crashed.is_set()
    assert sent == sum(file.size_bytes for file in sealed.files)
    sealed.assert_readable(registry.store())


def test_a_registry_that_is_gone_is_a_passing_fault(
    registry: RunningRegistry, seal_package: Any
) -> None:
    sealed = seal_package(large_bytes=32 << 20)  # more than sockets hold
    store = registry.store()
    put(store, sealed)
    with store.open_file(sealed.place, sealed.file("model.plan")) as chunks:
        next(chunks)
        registry.kill()
        with pytest.raises(TransientError):
            list(chunks)
    for call in (store.names, lambda: put(store, sealed)):
        with pytest.raises(TransientError):
            call()
    registry.start()
    sealed.assert_readable(store)


def test_of_two_publishers_of_different_bytes_one_wins(
    registry: RunningRegistry, seal_package: Any
) -> None:
    rivals = [seal_package(seed) for seed in (0, 10, 20, 30)]

    def run(sealed: Sealed) -> bool | None:
        try:
            return put(registry.store(), sealed)
        except ConflictError:
            return None

    with ThreadPoolExecutor(len(rivals)) as pool:
        done = list(pool.map(run, rivals))
    assert sorted(done, key=str) == [None, None, None, True]
    rivals[done.index(True)].assert_readable(registry.store())


def test_damage_in_the_registry_never_reads_as_the_package(
    registry: RunningRegistry, sealed: Sealed
) -> None:
    store = registry.store()
    put(store, sealed)
    repository = store._repository("tiny")
    image = store._require(sealed.place)
    statement = list_referrers(repository, image.document.digest)[0]
    blobs = [image.layers[0].digest, image.document.digest]
    blobs += [statement.descriptor.digest, next(iter(statement.files.values())).digest]
    for digest in blobs:
        path = registry.blob_path(digest)
        data = path.read_bytes()
        for damaged in (bytes(byte ^ 1 for byte in data), data[: min(len(data) // 2, 1100)], b""):
            path.write_bytes(damaged)
            reader = registry.store()
            # A registry that notices by itself answers 500 (docker-registry does for no JSON).
            with pytest.raises((CorruptError, NotFoundError, TransientError)):
                _ = (
                    reader.read_manifest(sealed.place),
                    reader.read_statement(sealed.place, statement.name),
                )
        path.write_bytes(data)
    sealed.assert_readable(registry.store())


def test_tags_that_are_not_ours_are_no_versions(registry: RunningRegistry, sealed: Sealed) -> None:
    store = registry.store()
    put(store, sealed)
    repository = store._repository("tiny")
    image = store._require(sealed.place)
    for tag in ("latest", "v1", "any_latest", "UPPER_1.0"):
        repository.put_manifest(tag, image.document)
    assert store.versions("tiny", sealed.place.variant) == [sealed.place.version]
    index = repository.manifest(f"sha256-{image.document.digest[7:]}")
    assert index is not None
    repository.put_manifest("any_2.0", index)
    with pytest.raises(CorruptError):
        store.read_manifest(Place(name="tiny", variant="any", version="2.0"))


def test_a_registry_that_may_not_delete_says_what_to_set(
    registry: RunningRegistry, sealed: Sealed
) -> None:
    store = registry.store()
    put(store, sealed)
    config = registry.folder / "config.yml"
    config.write_text(config.read_text().replace('"enabled": true', '"enabled": false'))
    registry.restart()
    with pytest.raises(PipelineError, match=r"storage\.delete\.enabled"):
        store.delete_version(sealed.place)
    sealed.assert_readable(store)


@pytest.mark.parametrize("seed", range(8))
def test_a_publisher_killed_anywhere_leaves_nothing_half_visible(
    registry: RunningRegistry, seal_package: Any, seed: int
) -> None:
    sealed = seal_package(large_bytes=8 << 20)
    pid = os.fork()
    if pid == 0:
        try:
            put(registry.store(), sealed)
        finally:
            os._exit(0)
    time.sleep(random.Random(seed).uniform(0.0, 0.6))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    reader = registry.store()
    for version in reader.versions(sealed.place.name, sealed.place.variant):
        assert version == sealed.place.version
        sealed.assert_readable(reader)
        assert {one.name for one in reader.statements(sealed.place)} == set(STATEMENTS)
    put(registry.store(), sealed)
    sealed.assert_readable(registry.store())
    assert {one.name for one in reader.statements(sealed.place)} == set(STATEMENTS)
