"""What goes wrong on the way to an S3 server: over real HTTP, against one that fails when asked."""

from __future__ import annotations

from typing import Any

import pytest
from tests.registry.stores.s3_packages import (
    SIGNATURES,
    assert_whole,
    keys,
    place_of,
)

from pipeline.core.errors import (
    AccessError,
    ConflictError,
    PipelineError,
    TransientError,
)
from pipeline.core.values import FileDigest, Package
from pipeline.registry.stores.s3 import S3Store, connection
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
