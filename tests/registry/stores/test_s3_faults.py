"""What goes wrong on the way to an S3 server: over real HTTP, against one that fails when asked."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import AccessError, CorruptError, PipelineError, TransientError
from pipeline.core.values import FileDigest, Package
from pipeline.registry.manifest import files_of
from pipeline.registry.stores import transfer
from pipeline.registry.stores.publication import WritableStore
from pipeline.registry.stores.s3 import S3Registry
from tests.registry.packages import place_of, raw_statement, read_back, sealed_package
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

PLAN = "engine/model.plan"


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """A package with a file of three parts and a small one."""
    files = {"model.plan": os.urandom(11 << 20), "tokenizer.json": b"{}"}
    return sealed_package(tmp_path / "package", files)


@pytest.fixture
def store(memory_s3_store: WritableStore) -> WritableStore:
    return memory_s3_store


@pytest.fixture
def published(store: WritableStore, package: Package) -> FileDigest:
    """The large file of a published package."""
    publish(store, package)
    return next(file for file in files_of(package.manifest) if file.path == PLAN)


def publish(store: WritableStore, package: Package) -> bool:
    return store.put_package(package, [raw_statement(model_sig=b"s")], lambda _: None)


def assert_whole(store: WritableStore, package: Package) -> None:
    """A reader sees exactly this package, and nothing is left over."""
    assert store.places() == [place_of(package)]
    assert [one.name for one in store.read_statements(place_of(package))] == [raw_statement().name]
    for path, data in read_back(store, package).items():
        assert data == (package.dir / path).read_bytes()
    assert store.leftovers(0.0, delete=False) == []


def read(store: WritableStore, package: Package, file: FileDigest, offset: int = 0) -> bytes:
    with store.open_file(place_of(package), file, offset) as chunks:
        return b"".join(chunks)


REQUESTS = [
    ("PUT", ".lease"),
    ("PUT", "tokenizer.json"),
    ("POST", "uploads"),
    ("PUT", "partNumber=2"),
    ("POST", "uploadId"),
    ("PUT", "statement.dsse.json"),
    ("PUT", "manifest.json"),
    ("PUT", "registry.json"),
]


@pytest.mark.parametrize("fault", [answer(503, "SlowDown"), reset])
@pytest.mark.parametrize(
    ("method", "path"), [*REQUESTS, ("HEAD", "model.plan"), ("GET", "manifest.json")]
)
def test_a_fault_that_passes_is_not_noticed(
    store: WritableStore,
    memory_s3: MemoryS3,
    package: Package,
    fault: Fault,
    method: str,
    path: str,
) -> None:
    memory_s3.fail(method, path, fault)
    assert publish(store, package)
    assert_whole(store, package)


@pytest.mark.parametrize(("method", "path"), [one for one in REQUESTS if one[0] == "PUT"])
def test_a_write_whose_reply_got_lost_counts_as_done(
    store: WritableStore, memory_s3: MemoryS3, package: Package, method: str, path: str
) -> None:
    memory_s3.fail(method, path, lose_reply)
    publish(store, package)
    assert_whole(store, package)


@pytest.mark.parametrize("path", ["manifest.json", "registry.json", "statement.dsse.json"])
def test_a_write_that_another_one_crossed_is_repeated(
    store: WritableStore, memory_s3: MemoryS3, package: Package, path: str
) -> None:
    memory_s3.fail("PUT", path, answer(409, "ConditionalRequestConflict"), times=2)
    assert publish(store, package)
    assert_whole(store, package)


def test_a_busy_server_is_transient_after_bounded_tries_and_nothing_shows(
    store: WritableStore, memory_s3: MemoryS3, package: Package
) -> None:
    memory_s3.fail("PUT", "manifest.json", answer(503, "SlowDown"), times=99)
    with pytest.raises(TransientError, match="SlowDown"):
        publish(store, package)
    assert memory_s3.count("PUT", "manifest.json") == transfer.ATTEMPTS
    assert store.places() == []


def test_bytes_that_the_server_stored_otherwise_are_found_before_the_package_shows(
    store: WritableStore, memory_s3: MemoryS3, package: Package
) -> None:
    def damage(handler: Handler) -> bool:
        for key, stored in handler.server.objects.items():
            if key.endswith(PLAN):
                stored.data = stored.data[:-1] + b"?"
        return False

    memory_s3.fail("HEAD", PLAN, lambda handler: False)  # whether it is there already
    memory_s3.fail("HEAD", PLAN, damage)
    with pytest.raises(CorruptError, match="not there as it was sent"):
        publish(store, package)
    assert store.places() == []
    assert publish(store, package)  # what is wrong is sent again
    assert_whole(store, package)


@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_a_server_that_tells_no_checksum_is_read_back(
    memory_s3: MemoryS3, package: Package, checksums: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory_s3.checksums = False
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", checksums)
    store = S3Registry(url=f"s3://{BUCKET}/x", part_bytes=5 << 20).store()
    assert publish(store, package)
    assert_whole(store, package)
    sent = {name.lower() for headers in memory_s3.headers for name in headers}
    assert ("x-amz-checksum-type" in sent) == (checksums == "when_supported")
    assert memory_s3.count("GET", PLAN) == 2  # by the publisher and by the reader


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
    store: WritableStore,
    memory_s3: MemoryS3,
    status: int,
    code: str,
    kind: type[PipelineError],
    words: str,
) -> None:
    memory_s3.fail("GET", "list-type", answer(status, code), times=9)
    with pytest.raises(kind, match=words) as caught:
        store.places()
    assert type(caught.value) is kind
    assert "secret-of-the-test" not in str(caught.value)


def test_a_server_that_is_not_there_is_transient(memory_s3: MemoryS3) -> None:
    memory_s3.server_close()
    with pytest.raises(TransientError, match="check the endpoint"):
        S3Registry(url="s3://bucket/x").store().places()


def portal(handler: Handler) -> bool:
    """A network that wants a login answers everything with its page."""
    page = b"<html><body>Log in</body></html>"
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(page)))
    handler.end_headers()
    handler.wfile.write(page)
    return True


def without_headers(handler: Handler) -> bool:
    """A HEAD and a GET that say nothing of size and date."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    return True


@pytest.mark.parametrize("fault", [portal, without_headers, spoil(sent_most=5)])
def test_a_server_that_talks_nonsense_ends_in_an_error_of_ours(
    store: WritableStore, memory_s3: MemoryS3, package: Package, fault: Fault
) -> None:
    for method in ("GET", "HEAD"):
        memory_s3.fail(method, "", fault, times=99)
    calls: list[Callable[[], object]] = [
        store.places,
        store.identity,
        store.now_s,
        lambda: store.read_manifest(place_of(package)),
        lambda: store.leftovers(0.0, delete=True),
        lambda: store.read_moves("tiny", place_of(package).variant),
    ]
    for call in calls:
        with contextlib.suppress(PipelineError):
            call()
    assert memory_s3.objects == {}


@pytest.mark.parametrize("sent_most", [0, 1, 3 << 20])
def test_a_small_or_large_object_whose_connection_breaks_once_is_read_again(
    store: WritableStore,
    memory_s3: MemoryS3,
    package: Package,
    published: FileDigest,
    sent_most: int,
) -> None:
    memory_s3.fail("GET", "manifest.json", spoil(sent_most=min(sent_most, 1)))
    assert store.read_manifest(place_of(package))
    expected = (package.dir / PLAN).read_bytes()
    memory_s3.fail("GET", PLAN, spoil(sent_most=sent_most))
    got = bytearray()

    def read_until_it_breaks() -> None:
        with store.open_file(place_of(package), published) as chunks:
            for chunk in chunks:
                got.extend(chunk)

    with pytest.raises(TransientError):
        read_until_it_breaks()
    assert got == expected[: len(got)]
    assert got + read(store, package, published, len(got)) == expected


def drip(handler: Handler) -> bool:
    """A byte now and then, of a body that never ends."""
    handler.send_response(206)
    handler.send_header("Content-Length", str(1 << 20))
    handler.send_header("ETag", '"x"')
    handler.send_header("Last-Modified", handler.date_time_string(0))
    handler.end_headers()
    return drip_on(handler)


def drip_head(handler: Handler) -> bool:
    """A byte now and then, of a header that never ends."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    return drip_on(handler)


def drip_on(handler: Handler) -> bool:
    try:
        while not handler.server.closing.wait(0.05):
            handler.wfile.write(b"x")
            handler.wfile.flush()
    except OSError:  # the client went away
        handler.close_connection = True
    return True


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", [drip, drip_head, spoil(sent_most=1, stall_s=60.0)])
def test_a_server_that_drips_or_stalls_is_left(
    store: WritableStore,
    memory_s3: MemoryS3,
    package: Package,
    published: FileDigest,
    fault: Fault,
) -> None:
    memory_s3.fail("GET", "", fault, times=99)
    began_s = time.monotonic()
    with pytest.raises(TransientError):
        store.read_manifest(place_of(package))
    with pytest.raises(TransientError):
        read(store, package, published)
    assert time.monotonic() - began_s < 40.0


def test_a_listing_without_end_is_an_error(
    store: WritableStore,
    memory_s3: MemoryS3,
    package: Package,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish(store, package)
    memory_s3.page = 1
    assert_whole(store, package)
    monkeypatch.setattr("pipeline.registry.stores.s3._MAX_PAGES", 2)
    with pytest.raises(PipelineError, match="more than 2 pages"):
        store.places()


def test_a_server_that_ignores_ranges_still_gives_the_right_bytes(
    store: WritableStore, memory_s3: MemoryS3, package: Package, published: FileDigest
) -> None:
    expected = (package.dir / PLAN).read_bytes()
    for offset in (0, 1, 3 << 20, len(expected) - 1):
        memory_s3.fail("GET", PLAN, spoil(ignores_range=True))
        assert read(store, package, published, offset) == expected[offset:]


def test_a_reader_that_says_where_it_ends_gets_no_more_and_leaves_the_connection(
    store: WritableStore, memory_s3: MemoryS3, package: Package, published: FileDigest
) -> None:
    requests, connections = len(memory_s3.requests), memory_s3.connections
    for start in (0, 1 << 20):
        end = start + (1 << 20)
        with store.open_file(place_of(package), published, start, end) as chunks:
            assert sum(len(chunk) for chunk in chunks) == 1 << 20
    asked = [headers.get("Range") for headers in memory_s3.headers[requests:]]
    assert asked == ["bytes=0-1048575", "bytes=1048576-2097151"]
    assert memory_s3.connections == connections


def test_a_public_bucket_is_read_without_credentials(
    store: WritableStore, memory_s3: MemoryS3, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, package)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    before = len(memory_s3.headers)
    assert_whole(S3Registry(url=store.url, public=True).store(), package)
    assert not any("Authorization" in headers for headers in memory_s3.headers[before:])


def test_a_server_without_conditional_writes_is_refused(
    store: WritableStore, memory_s3: MemoryS3
) -> None:
    memory_s3.fail("PUT", ".writable-", spoil(ignores_checks=True), times=2)
    with pytest.raises(AccessError, match="ignores If-None-Match"):
        store.check_writable()
    assert memory_s3.objects == {}


def test_a_check_for_writing_needs_the_right_to_write_and_not_to_remove(
    store: WritableStore, memory_s3: MemoryS3
) -> None:
    memory_s3.fail("DELETE", ".writable-", answer(403, "AccessDenied"))
    store.check_writable()
    assert len(store.leftovers(0.0, delete=True)) == 1
    assert memory_s3.objects == {}
    memory_s3.fail("PUT", ".writable-", answer(403, "AccessDenied"))
    with pytest.raises(AccessError, match="s3://bucket/registry"):
        store.check_writable()


def test_a_killed_upload_is_aborted_a_day_later(
    store: WritableStore, memory_s3: MemoryS3, package: Package, age: Callable[[float], None]
) -> None:
    memory_s3.fail("PUT", "partNumber=3", answer(403, "AccessDenied"))
    memory_s3.fail("DELETE", "uploadId", answer(403, "AccessDenied"), times=9)
    with pytest.raises(AccessError):
        publish(store, package)
    assert memory_s3.uploads
    memory_s3.heal()
    assert store.leftovers(24 * 3600.0, delete=True) == []
    age(25 * 3600.0)
    assert any("unfinished upload" in one for one in store.leftovers(24 * 3600.0, delete=True))
    assert memory_s3.uploads == {}
    assert publish(store, package)
    assert_whole(store, package)


def test_a_forked_child_has_connections_of_its_own(
    store: WritableStore, memory_s3: MemoryS3, package: Package
) -> None:
    assert store.places() == []
    child = os.fork()
    if child == 0:
        os._exit(0 if publish(store, package) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_whole(store, package)
