"""What goes wrong on the way to an S3 server: over real HTTP, against one that fails when asked."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import (
    AccessError,
    ConflictError,
    CorruptError,
    PipelineError,
    TransientError,
)
from pipeline.registry.client.download import files_of
from pipeline.registry.stores.s3 import S3Store, connection, reading
from pipeline.registry.stores.s3.crc32 import combined
from pipeline.stages import FileDigest, Package
from tests.registry.stores.s3_packages import (
    SIGNATURES,
    age_everything,
    assert_whole,
    keys,
    place_of,
    read_file,
    sealed,
)
from tests.registry.stores.s3_server import (
    BUCKET,
    Fault,
    Handler,
    MemoryS3,
    answer,
    lose_reply,
    reset,
    spoil,
)

Bench = Any


@pytest.fixture
def package(bench: Bench, tmp_path: Path) -> Package:
    return sealed(bench, tmp_path / "package")


@pytest.fixture
def published(store: S3Store, package: Package) -> FileDigest:
    """The large file of a published package."""
    store.put_package(package, SIGNATURES)
    return max(files_of(package.manifest), key=lambda file: file.size_bytes)


@pytest.mark.parametrize("fault", [answer(503, "SlowDown"), reset])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", ".claim"),
        ("PUT", "tokenizer.json"),
        ("POST", "uploads"),
        ("PUT", "partNumber=2"),
        ("POST", "uploadId"),
        ("PUT", ".statement"),
        ("PUT", "manifest.json"),
        ("HEAD", "model.plan"),
        ("DELETE", ".claim"),
    ],
)
def test_fault_that_passes_is_not_noticed(
    store: S3Store, memory: MemoryS3, package: Package, fault: Fault, method: str, path: str
) -> None:
    memory.fail(method, path, fault)
    assert store.put_package(package, SIGNATURES)
    assert_whole(store, package)
    assert not any(key.endswith((".claim", "?")) for key in keys(store))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", ".claim"),
        ("PUT", "tokenizer.json"),
        ("POST", "uploads"),
        ("PUT", "partNumber=3"),
        ("POST", "uploadId"),
        ("PUT", ".statement"),
        ("PUT", "manifest.json"),
    ],
)
def test_request_whose_reply_got_lost_counts_as_done(
    store: S3Store, memory: MemoryS3, package: Package, method: str, path: str
) -> None:
    memory.fail(method, path, lose_reply)
    assert store.put_package(package, SIGNATURES)
    assert_whole(store, package)
    assert not any(key.endswith((".claim", "?")) for key in keys(store))


def test_move_whose_reply_got_lost_was_made(store: S3Store, memory: MemoryS3) -> None:
    memory.fail("PUT", "log/", lose_reply)
    store.put_move("tiny", "any-x", "stable.card.000001.dsse.json", b"one")
    with pytest.raises(ConflictError):
        store.put_move("tiny", "any-x", "stable.card.000001.dsse.json", b"one")


@pytest.mark.parametrize("path", ["manifest.json", "tokenizer.json", ".claim", ".statement"])
def test_write_that_another_one_crossed_is_repeated(
    store: S3Store, memory: MemoryS3, package: Package, path: str
) -> None:
    memory.fail("PUT", path, answer(409, "ConditionalRequestConflict"), times=2)
    assert store.put_package(package, SIGNATURES)
    assert_whole(store, package)


def test_multipart_upload_that_another_one_crossed_is_begun_anew(
    store: S3Store, memory: MemoryS3, package: Package
) -> None:
    memory.fail("POST", "uploadId", answer(409, "ConditionalRequestConflict"))
    assert store.put_package(package, {})
    assert_whole(store, package)
    assert memory.count("POST", "uploads") == 2
    assert memory.uploads == {}


def test_upload_that_somebody_aborted_is_begun_anew(
    store: S3Store, memory: MemoryS3, package: Package
) -> None:
    def abort(handler: Handler) -> bool:
        handler.server.uploads.clear()
        return False

    memory.fail("PUT", "partNumber=2", abort)
    assert store.put_package(package, {})
    assert_whole(store, package)


def test_busy_server_is_transient_after_bounded_tries(
    store: S3Store, memory: MemoryS3, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_ATTEMPTS", 2)
    memory.fail("PUT", "manifest.json", answer(503, "SlowDown"), times=99)
    with pytest.raises(TransientError, match="SlowDown"):
        store.put_package(package, {})
    assert memory.count("PUT", "manifest.json") == 2
    assert store.versions("tiny", place_of(package).variant) == []


def test_server_that_is_not_there_is_transient(
    memory: MemoryS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_ATTEMPTS", 2)
    memory.server_close()
    with pytest.raises(TransientError, match="check the endpoint"):
        S3Store(url="s3://bucket/x", endpoint_url=memory.url).names()


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (403, "AccessDenied", AccessError, "ask for permission"),
        (403, "RequestTimeTooSkewed", AccessError, "clock is wrong"),
        (400, "ExpiredToken", AccessError, "expired"),
        (403, "InvalidAccessKeyId", AccessError, "AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", AccessError, "AWS_SECRET_ACCESS_KEY"),
        (401, "Unauthorized", AccessError, "ask for permission"),
        (301, "PermanentRedirect", PipelineError, "AWS_REGION"),
        (429, "TooManyRequests", TransientError, "try again later"),
        (400, "RequestTimeout", TransientError, "try again later"),
        (400, "SomethingNew", PipelineError, "speaks S3"),
    ],
)
def test_refusals_say_what_to_do(
    memory: MemoryS3,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    kind: type[PipelineError],
    words: str,
) -> None:
    monkeypatch.setattr(connection, "_ATTEMPTS", 1)
    memory.fail("GET", "list-type", answer(status, code), times=9)
    with pytest.raises(kind, match=words) as caught:
        S3Store(url=f"s3://{BUCKET}/x").names()
    assert type(caught.value) is kind
    assert "secret-of-the-test" not in str(caught.value)


@pytest.mark.parametrize(
    "fault", [spoil(sent_most=3 << 20), spoil(sent_most=0), spoil(sent_most=1 << 20, stall_s=30.0)]
)
def test_body_that_breaks_off_is_transient_and_what_came_is_right(
    store: S3Store,
    memory: MemoryS3,
    package: Package,
    published: FileDigest,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    monkeypatch.setattr(connection, "_READ_S", 1)
    reader = S3Store(url=store.url)
    expected = (package.dir / published.path).read_bytes()
    memory.fail("GET", "model.plan", fault)
    got = bytearray()

    def read() -> None:
        with reader.open_file(place_of(package), published, len(got)) as chunks:
            for chunk in chunks:
                got.extend(chunk)

    with pytest.raises(TransientError):
        read()
    assert got == expected[: len(got)]
    assert len(got) < len(expected)
    read()  # the next one goes on there
    assert bytes(got) == expected


def test_server_that_ignores_ranges_still_gives_the_right_bytes(
    store: S3Store, memory: MemoryS3, package: Package, published: FileDigest
) -> None:
    expected = (package.dir / published.path).read_bytes()
    for offset in (0, 1, 3 << 20, len(expected) - 1):
        memory.fail("GET", "model.plan", spoil(ignores_range=True))
        assert read_file(store, place_of(package), published, offset) == expected[offset:]


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


def test_checksums_go_along_and_a_server_that_refuses_them_gets_none(
    store: S3Store, memory: MemoryS3, package: Package
) -> None:
    store.put_package(package, {})
    sent = {name.lower() for headers in memory.headers for name in headers}
    assert {"x-amz-checksum-sha256", "x-amz-checksum-crc32", "x-amz-checksum-type"} <= sent
    assert "x-amz-mp-object-size" in sent

    def refuse(handler: Handler) -> bool:
        handler.server.fail("PUT", "", refuse)
        handler.server.fail("POST", "", refuse)
        if not any(name.lower().startswith("x-amz-checksum") for name in handler.headers):
            return False
        handler.refuse(501, "NotImplemented")
        return True

    store.delete_version(place_of(package))
    memory.fail("PUT", "", refuse)
    memory.fail("POST", "", refuse)
    assert S3Store(url=store.url, part_bytes=5 << 20).put_package(package, SIGNATURES)
    assert_whole(store, package)


def test_bytes_that_were_hurt_on_their_way_are_transient(
    store: S3Store, memory: MemoryS3, package: Package
) -> None:
    memory.fail("PUT", "partNumber=2", answer(400, "BadDigest"))
    with pytest.raises(TransientError, match="BadDigest"):
        store.put_package(package, {})
    assert store.versions("tiny", place_of(package).variant) == []
    assert store.put_package(package, {})
    assert memory.count("PUT", "partNumber=1") == 1  # the part that had arrived was kept


def test_server_without_conditional_writes_is_refused(store: S3Store, memory: MemoryS3) -> None:
    memory.fail("PUT", ".writable-", spoil(ignores_checks=True), times=2)
    with pytest.raises(AccessError, match="ignores If-None-Match"):
        store.check_writable()
    assert memory.objects == {}


def test_check_for_writing_is_content_without_the_right_to_remove(
    store: S3Store, memory: MemoryS3
) -> None:
    memory.fail("DELETE", ".writable-", answer(403, "AccessDenied"))
    store.check_writable()
    (left,) = keys(store)
    assert left.startswith(".writable-")
    assert store.leftovers(0.0, delete=True) == [f"{left} (left by a check, 1 bytes)"]
    assert keys(store) == set()


def test_check_for_writing_needs_the_right_to_write(store: S3Store, memory: MemoryS3) -> None:
    memory.fail("PUT", ".writable-", answer(403, "AccessDenied"))
    with pytest.raises(AccessError, match="publish to s3://bucket/registry"):
        store.check_writable()


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
