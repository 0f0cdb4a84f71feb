"""What only an S3 server can do to us; test_network.py has what any server can."""

from __future__ import annotations

import pytest

from pipeline.core.errors import AccessError, CorruptError, PipelineError, TransientError
from pipeline.registry.stores.publication import WritableStore
from tests.registry.stores.faulty import refusing, spoil
from tests.registry.stores.s3_server import Handler, MemoryS3
from tests.registry.stores.test_network import PLAN, Served, served

__all__ = ["served"]

pytestmark = pytest.mark.parametrize("served", ["s3"], indirect=True)


@pytest.fixture
def server(served: Served, memory_s3: MemoryS3) -> MemoryS3:
    return memory_s3


@pytest.fixture
def store(served: Served) -> WritableStore:
    return served.store


@pytest.mark.parametrize("path", ["manifest.json", "registry.json", "statement.dsse.json"])
def test_a_write_that_another_one_crossed_is_repeated(
    served: Served, server: MemoryS3, path: str
) -> None:
    server.fail("PUT", path, refusing(409, "ConditionalRequestConflict"), times=2)
    assert served.publish()
    served.assert_whole()


def test_bytes_that_the_server_stored_otherwise_are_found_before_the_package_shows(
    served: Served, server: MemoryS3
) -> None:
    def damage(handler: Handler) -> bool:
        for key, stored in handler.server.objects.items():
            if key.endswith(PLAN):
                stored.data = stored.data[:-1] + b"?"
        return False

    server.fail("HEAD", PLAN, spoil())  # whether it is there already
    server.fail("HEAD", PLAN, damage)
    with pytest.raises(CorruptError, match="not there as it was sent"):
        served.publish()
    assert served.store.places() == []
    assert served.publish()  # what is wrong is sent again
    served.assert_whole()


@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_a_server_that_tells_no_checksum_is_read_back(
    served: Served, server: MemoryS3, checksums: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.checksums = False
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", checksums)
    assert served.publish()
    sent = {name.lower() for one in server.seen for name in one.headers}
    assert ("x-amz-checksum-type" in sent) == (checksums == "when_supported")
    assert server.count("GET", PLAN) == 1
    served.assert_whole()


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (400, "ExpiredToken", AccessError, "expired"),
        (301, "PermanentRedirect", PipelineError, "AWS_REGION"),
        (400, "RequestTimeout", TransientError, "try again later"),
        (400, "SomethingNew", PipelineError, "speaks S3"),
    ],
)
def test_refusals_say_what_to_do(
    store: WritableStore,
    server: MemoryS3,
    status: int,
    code: str,
    kind: type[PipelineError],
    words: str,
) -> None:
    server.fail("GET", "list-type", refusing(status, code), times=9)
    with pytest.raises(kind, match=words) as caught:
        store.places()
    assert type(caught.value) is kind
    assert "secret-of-the-test" not in str(caught.value)


def test_a_server_without_conditional_writes_is_refused(
    store: WritableStore, server: MemoryS3
) -> None:
    server.fail("PUT", ".writable", spoil(ignores_checks=True), times=2)
    with pytest.raises(AccessError, match="ignores If-None-Match"):
        store.check_writable()


def test_a_check_for_writing_needs_the_right_to_write_and_no_other(
    store: WritableStore, server: MemoryS3
) -> None:
    for _ in range(2):
        store.check_writable()
    assert len(server.objects) == 1
    assert {one.method for one in server.seen} == {"PUT"}
    server.fail("PUT", ".writable", refusing(403, "AccessDenied"))
    with pytest.raises(AccessError, match="s3://bucket/registry"):
        store.check_writable()


def test_a_killed_upload_is_aborted_a_day_later(served: Served, server: MemoryS3) -> None:
    server.fail("PUT", "partNumber=3", refusing(403, "AccessDenied"))
    server.fail("DELETE", "uploadId", refusing(403, "AccessDenied"), times=9)
    with pytest.raises(AccessError):
        served.publish()
    assert server.uploads
    server.heal()
    assert served.store.leftovers(24 * 3600.0, delete=True) == []
    for upload in server.uploads.values():
        upload.begun_s -= 25 * 3600.0
    (words,) = served.store.leftovers(24 * 3600.0, delete=True)
    assert "unfinished upload" in words
    assert server.uploads == {}
    assert served.publish()
    served.assert_whole()
