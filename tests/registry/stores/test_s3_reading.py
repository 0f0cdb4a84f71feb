"""What readers of an S3 server see when it fails, ignores ranges or changes under them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipeline.registry.client.owned import Owned
from tests.registry.stores.s3_packages import (
    SIGNATURES,
    assert_whole,
    place_of,
    read_file,
)

from pipeline.core.errors import (
    CorruptError,
    TransientError,
)
from pipeline.core.values import FileDigest, Package
from pipeline.registry.client.download import PACKAGE, Transfer, download, files_of
from pipeline.registry.stores.s3 import S3Store, connection, reading
from tests.registry.client.conftest import QUICK
from tests.registry.stores.s3_server import (
    Handler,
    MemoryS3,
    reset,
    spoil,
)

Bench = Any


def test_server_that_ignores_ranges_still_gives_the_right_bytes(
    store: S3Store, memory: MemoryS3, package: Package, published: FileDigest
) -> None:
    expected = (package.dir / published.path).read_bytes()
    for offset in (0, 1, 3 << 20, len(expected) - 1):
        memory.fail("GET", "model.plan", spoil(ignores_range=True))
        assert read_file(store, place_of(package), published, offset) == expected[offset:]


def test_a_body_that_was_compressed_on_its_way_is_never_taken_for_the_file(
    store: S3Store, memory: MemoryS3, package: Package, published: FileDigest, tmp_path: Path
) -> None:
    """Nobody asked for it, so nobody undoes it; the digest of the file gives it away."""
    owned = Owned(dir=tmp_path / "pulled", adopted=False)
    (owned.dir / PACKAGE / "engine").mkdir(parents=True)

    def fetch() -> int:
        return download(
            store,
            place_of(package),
            files_of(package.manifest),
            owned,
            package.digest,
            Transfer(retry=QUICK),
            lambda count: None,
        )

    memory.fail("GET", "model.plan", spoil(gzips=True), times=100)
    with pytest.raises((CorruptError, TransientError)):
        fetch()
    memory.heal()
    fetch()
    for file in files_of(package.manifest):
        assert (owned.dir / PACKAGE / file.path).read_bytes() == (
            package.dir / file.path
        ).read_bytes()


def _replace(server: MemoryS3) -> None:
    (key,) = (key for key in server.objects if key.endswith("model.plan"))
    stored = server.objects[key]
    stored.data = bytes(len(stored.data))
    stored.etag = '"another"'


@pytest.mark.parametrize("honours_if_match", [True, False])
def test_object_that_changes_between_ranges_is_noticed(
    store: S3Store,
    memory: MemoryS3,
    package: Package,
    published: FileDigest,
    monkeypatch: pytest.MonkeyPatch,
    honours_if_match: bool,
) -> None:
    monkeypatch.setattr(reading, "RANGE_BYTES", 8 << 20)
    if not honours_if_match:
        memory.fail("GET", "model.plan", lambda handler: False)  # the first range passes
        memory.fail("GET", "model.plan", spoil(ignores_checks=True))
    got = []

    def read() -> None:
        with store.open_file(place_of(package), published) as chunks:
            for chunk in chunks:
                got.append(chunk)
                _replace(memory)

    with pytest.raises(TransientError, match="changed while it was read"):
        read()
    assert sum(map(len, got)) == 8 << 20
    assert all(any(chunk) for chunk in got)  # nothing of the other object
    assert not any(read_file(store, place_of(package), published))  # a new reader sees it


def test_object_that_changes_between_pieces_is_noticed(
    store: S3Store, memory: MemoryS3, package: Package, published: FileDigest
) -> None:
    with store.open_file(place_of(package), published) as chunks:
        next(chunks)
    _replace(memory)
    with pytest.raises(TransientError, match="changed while it was read"):
        read_file(store, place_of(package), published, 5 << 20)


def test_readers_of_whole_ranges_share_connections_and_make_no_other_request(
    store: S3Store,
    memory: MemoryS3,
    package: Package,
    published: FileDigest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "RANGE_BYTES", 4 << 20)
    requests, connections = len(memory.requests), memory.connections
    for start in (0, 4 << 20):
        left = 4 << 20
        with store.open_file(place_of(package), published, start) as chunks:
            for chunk in chunks:
                left -= len(chunk)
                if not left:
                    break
    assert [verb for verb, _ in memory.requests[requests:]] == ["GET", "GET"]
    asked = [headers.get("If-Match") for headers in memory.headers[requests:]]
    (stored,) = (one for key, one in memory.objects.items() if key.endswith("model.plan"))
    assert asked == [None, stored.etag]
    assert memory.connections == connections


def test_a_reader_that_says_where_it_ends_gets_no_more_and_leaves_the_connection(
    store: S3Store, memory: MemoryS3, package: Package, published: FileDigest
) -> None:
    requests, connections = len(memory.requests), memory.connections
    for start in (0, 1 << 20):
        with store.open_file(place_of(package), published, start, start + (1 << 20)) as chunks:
            assert sum(len(chunk) for chunk in chunks) == 1 << 20
    asked = [headers.get("Range") for headers in memory.headers[requests:]]
    assert asked == ["bytes=0-1048575", "bytes=1048576-2097151"]
    assert memory.connections == connections


def test_public_bucket_is_read_without_credentials(
    store: S3Store, memory: MemoryS3, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_package(package, {})
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    before = len(memory.headers)
    assert_whole(S3Store(url=store.url, public=True), package)
    assert not any("Authorization" in headers for headers in memory.headers[before:])


def test_listing_goes_on_over_all_pages(store: S3Store, memory: MemoryS3, package: Package) -> None:
    store.put_package(package, SIGNATURES)
    memory.page = 2
    assert_whole(store, package)
    for number in range(5):
        store.put_move("tiny", "any-x", f"stable.card.{number:06d}.dsse.json", b"%d" % number)
    assert len(store.moves("tiny", "any-x")) == 5


def test_files_of_another_tool_are_read_back_before_they_are_believed(
    store: S3Store, memory: MemoryS3, package: Package
) -> None:
    place = place_of(package)
    bucket = store._bucket()
    for file in files_of(package.manifest):
        data = (package.dir / file.path).read_bytes()
        bucket.write(f"{bucket.address.version(place)}/{file.path}", data)
    sent: list[int] = []
    assert store.put_package(package, {}, sent.append)
    assert sent == []
    store.delete_version(place)
    for file in files_of(package.manifest):
        key = f"{bucket.address.version(place)}/{file.path}"
        bucket.write(key, bytes(file.size_bytes))  # right size, wrong bytes
    assert store.put_package(package, {}, sent.append)
    assert_whole(store, package)


def test_wrong_file_below_a_manifest_is_told_after_publishing(
    store: S3Store, memory: MemoryS3, package: Package
) -> None:
    def spoil_plan(handler: Handler) -> bool:
        (key,) = (key for key in memory.objects if key.endswith("model.plan"))
        memory.objects[key].metadata["sha256"] = "0" * 64
        return False

    memory.fail("PUT", "manifest.json", spoil_plan)
    with pytest.raises(CorruptError, match="other bytes than were sent"):
        store.put_package(package, {})


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data.replace(b'"schema": 1', b'"schema": 2'),
        lambda data: data.replace(b"manifest.dsse.json", b"../../dsse.js.json"),
        lambda data: data.replace(b": 13", b":-13"),
        lambda data: b"",
        lambda data: b"{" * 20_000,
    ],
)
def test_damaged_statement_is_corrupt_and_the_list_goes_on(
    store: S3Store, memory: MemoryS3, package: Package, damage: Callable[[bytes], bytes]
) -> None:
    store.put_package(package, SIGNATURES)
    (key,) = (key for key in memory.objects if key.endswith(".statement"))
    memory.objects[key].data = damage(memory.objects[key].data)
    with pytest.raises(CorruptError):
        store.read_statement(place_of(package), "build-1")
    assert [found.name for found in store.statements(place_of(package))] == ["build-1"]


def test_reader_sees_a_statement_whole_or_not_at_all_after_every_request(
    store: S3Store, memory: MemoryS3, package: Package
) -> None:
    store.put_package(package, {})
    place = place_of(package)
    files = {"report.json": b"{}", "report.html": b"<html>", "junit.xml": b"<x/>"}
    reader = S3Store(url=store.url)
    seen: list[bool] = []

    def look(handler: Handler) -> bool:
        handler.server.fail("PUT", ".statements/", look)
        listed = [found.name for found in reader.statements(place)]
        if listed:
            assert reader.read_statement(place, "test-1") == files
        seen.append(bool(listed))
        return False

    memory.fail("PUT", ".statements/", look)
    store.put_statement(place, "test-1", files)
    assert seen == [False, True, True, True]


def test_statement_of_a_killed_run_gets_its_copies_from_the_next_one(
    store: S3Store, memory: MemoryS3, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_ATTEMPTS", 1)
    memory.fail("PUT", ".statements/build-1/", reset)
    with pytest.raises(TransientError):
        store.put_package(package, SIGNATURES)
    other = {"build-1": {"manifest.dsse.json": b"signed again"}}
    assert S3Store(url=store.url).put_package(package, other)
    place = place_of(package)
    assert store.read_statement(place, "build-1") == SIGNATURES["build-1"]
    folder = store._bucket().address.statements(place)
    for file, content in SIGNATURES["build-1"].items():
        assert memory.objects[f"{folder}build-1/{file}"].data == content
