"""A registry that misbehaves, over real HTTP."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable

import pytest

from pipeline.core.errors import AccessError, CorruptError, PipelineError, TransientError
from pipeline.core.values import Package
from pipeline.registry.store import ENVELOPE, RawStatement
from pipeline.registry.stores import transfer
from pipeline.registry.stores.oci import writing
from pipeline.registry.stores.oci.address import statement_tag, version_tag
from pipeline.registry.stores.oci.image import digest_of
from tests.registry.packages import place_of, raw_statement
from tests.registry.stores.oci.conftest import PLAN, assert_readable, file_of, put, read
from tests.registry.stores.oci.server import FakeRegistry, Handler, once

REPOSITORY = "engines/tiny"

CALLS = [
    ("POST", "/uploads/"),
    ("HEAD", "/blobs/"),
    ("PATCH", "/uploads/"),
    ("PUT", "/uploads/"),
    ("PUT", "/manifests/"),
    ("GET", "/referrers/"),
    ("GET", "/manifests/"),
    ("GET", "/blobs/"),
]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "act",
    [
        lambda h: h.error(429, "TOOMANYREQUESTS", Retry_After="0"),
        lambda h: h.error(503, "UNAVAILABLE"),
        lambda h: h.answer(500, b"<html>", "text/html"),
        lambda h: h.reset(),
        lambda h: time.sleep(1.2),
    ],
    ids=["429", "503", "500", "reset", "stall"],
)
def test_a_passing_fault_of_any_request_is_tried_again(
    fake: FakeRegistry, package: Package, act: Callable[[Handler], None]
) -> None:
    hit = set()

    def fault(handler: Handler) -> bool:
        for call in CALLS:
            if handler.command == call[0] and call[1] in handler.path and call not in hit:
                hit.add(call)
                act(handler)
                return True
        return False

    fake.faults.append(fault)
    store = fake.store()
    assert put(store, package)
    assert_readable(store, package)
    assert hit == set(CALLS)


def test_an_upload_goes_on_where_the_registry_says_that_it_stopped(
    fake: FakeRegistry, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "PART_BYTES", 256 << 10)
    fake.faults += [
        once("PATCH", part="/uploads/", act=lambda h: h.error(416, "BLOB_UPLOAD_INVALID")),
        once("PATCH", part="/uploads/", act=lambda h: h.error(404, "BLOB_UPLOAD_UNKNOWN")),
    ]
    sent: list[int] = []
    assert fake.store().put_package(
        package, [raw_statement(), raw_statement("provenance")], sent.append
    )
    assert_readable(fake.store(), package)
    assert sum(sent) == sum(file["size"] for file in package.manifest["files"])


@pytest.mark.parametrize("part", ["/manifests/", "/referrers/", "/tags/"])
def test_a_document_that_ends_early_is_asked_again(
    fake: FakeRegistry, package: Package, part: str
) -> None:
    put(fake.store(), package)
    fake.faults.append(
        once("GET", part=part, act=lambda h: h.answer(200, b"{", Content_Length="1000"))
    )
    assert len(fake.store().statement_names("tiny")[place_of(package)]) == 2


def test_a_fault_that_stays_ends_after_a_bounded_number_of_attempts(
    fake: FakeRegistry, package: Package
) -> None:
    put(fake.store(), package)
    unavailable = once("GET", part="", act=lambda h: h.error(503, "UNAVAILABLE"), times=99)
    fake.faults.append(unavailable)
    fake.seen.clear()
    with pytest.raises(TransientError, match="503"):
        fake.store().read_manifest(place_of(package))
    assert len(fake.seen) == transfer.ATTEMPTS


def test_a_registry_that_does_not_see_its_blobs_yet_is_asked_again(
    fake: FakeRegistry, package: Package
) -> None:
    unseen = once("PUT", part="/manifests/", act=lambda h: h.error(400, "MANIFEST_BLOB_UNKNOWN"))
    fake.faults.append(unseen)
    assert put(fake.store(), package)
    assert_readable(fake.store(), package)


def test_retry_after_is_obeyed(fake: FakeRegistry) -> None:
    fake.faults.append(
        once("GET", part="tags", act=lambda h: h.error(429, "TOOMANY", Retry_After="1"))
    )
    began = time.monotonic()
    assert fake.store().places("tiny") == []
    assert time.monotonic() - began > 0.9


def test_a_redirect_that_never_ends_is_left(fake: FakeRegistry, package: Package) -> None:
    put(fake.store(), package)
    fake.blobs_at = fake.host
    with pytest.raises(TransientError, match="redirects"):
        read(fake.store(), package)


def drip(handler: Handler) -> None:
    """A byte now and then, of a reply that never ends."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    drip_head(handler)


def drip_head(handler: Handler) -> None:
    """A byte now and then, of a header that never ends."""
    with contextlib.suppress(OSError):
        for _ in range(400):
            handler.wfile.write(b"x")
            time.sleep(0.05)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("act", [drip, drip_head])
def test_a_registry_that_drips_is_left(
    fake: FakeRegistry, package: Package, act: Callable[[Handler], None]
) -> None:
    put(fake.store(), package)
    fake.faults.append(once("GET", part="", act=act, times=99))
    began_s = time.monotonic()
    with pytest.raises(TransientError):
        fake.store().read_manifest(place_of(package))
    assert time.monotonic() - began_s < 20.0


def test_a_server_that_ignores_range_still_gives_the_right_bytes_within_a_bound(
    fake: FakeRegistry, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(fake.store(), package)
    fake.ranges = False
    assert_readable(fake.store(), package)
    monkeypatch.setattr(transfer, "_MAX_SKIP_BYTES", 100_000)
    assert read(fake.store(), package) == (package.dir / PLAN).read_bytes()
    with pytest.raises(TransientError, match="ignores Range"):
        read(fake.store(), package, offset=500_000)


@pytest.mark.parametrize("cut", [0, 1000, 500_000])
def test_a_body_that_ends_early_is_noticed_while_it_is_read(
    fake: FakeRegistry, package: Package, cut: int
) -> None:
    put(fake.store(), package)
    size = file_of(package, PLAN).size_bytes

    def short(handler: Handler) -> None:
        start = handler.headers["Range"].removeprefix("bytes=").partition("-")[0]
        extent = f"bytes {start}-{int(start) + size - 1}/99999999"
        data = bytes(cut)
        handler.answer(206, data, "a/b", Content_Range=extent, Content_Length=str(size))

    fake.faults.append(once("GET", part="/blobs/", act=short))
    with pytest.raises(TransientError):
        read(fake.store(), package)


def test_a_range_that_was_not_asked_is_refused(fake: FakeRegistry, package: Package) -> None:
    put(fake.store(), package)
    wrong = once(
        "GET", part="/blobs/", act=lambda h: h.answer(206, b"x", Content_Range="bytes 0-0/1")
    )
    fake.faults.append(wrong)
    with pytest.raises(TransientError, match="another range"):
        read(fake.store(), package)


def test_the_callers_own_fault_is_not_taken_for_one_of_the_connection(
    fake: FakeRegistry, package: Package
) -> None:
    store = fake.store()
    put(store, package)

    def write() -> None:
        with store.open_file(place_of(package), file_of(package, PLAN)) as chunks:
            for _ in chunks:
                raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()


GARBAGE = [
    *(b"", b"null", b"[]", b"{" * 100_000, b"\xff", b"<html>"),
    *(b'{"manifests": [{"size": -1}]}', b'{"tags": [3]}', b'{"repositories": {"a": 1}}'),
]


@pytest.mark.parametrize("kind", ["application/json", "text/html"])
@pytest.mark.parametrize("body", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_never_taken_for_an_answer(
    fake: FakeRegistry, package: Package, body: bytes, kind: str
) -> None:
    put(fake.store(), package)
    fake.faults.append(once("GET", part="", act=lambda h: h.answer(200, body, kind), times=99))
    store = fake.store()
    place = place_of(package)
    with pytest.raises(PipelineError):
        store.read_manifest(place)
    with pytest.raises(PipelineError):
        store.identity()
    for call in (store.places, lambda: store.places("tiny"), lambda: store.read_statements(place)):
        with contextlib.suppress(PipelineError):
            assert call() == []


def test_a_document_that_is_too_long_or_not_the_one_asked_is_refused(
    fake: FakeRegistry, package: Package
) -> None:
    put(fake.store(), package)
    _, data = fake.manifests[REPOSITORY, version_tag(place_of(package))]
    digest = digest_of(data)
    acts: list[Callable[[Handler], None]] = [
        lambda h: h.answer(200, data.replace(b"1970", b"1971"), Docker_Content_Digest=digest),
        lambda h: h.answer(200, b"{" + b" " * (4 << 20) + b"}"),
        lambda h: h.answer(200, b"{}", Docker_Content_Digest="sha256:" + "0" * 64),
    ]
    for act in acts:
        fake.faults[:] = [once("GET", part="/manifests/", act=act, times=9)]
        with pytest.raises(CorruptError):
            fake.store().read_manifest(place_of(package))


def test_a_registry_of_another_kind_says_what_it_wants(fake: FakeRegistry) -> None:
    fake.faults.append(once("POST", part="/uploads/", act=lambda h: h.error(405, "UNSUPPORTED")))
    with pytest.raises(AccessError, match="read-only"):
        fake.store().check_writable()
    fake.faults[:] = [once("POST", part="/uploads/", act=lambda h: h.error(403, "DENIED"))]
    with pytest.raises(AccessError, match="ENGINESMITH_OCI_USERNAME"):
        fake.store().check_writable()
    fake.faults[:] = [once("GET", part="_catalog", act=lambda h: h.error(404, "NO"))]
    with pytest.raises(AccessError, match="name the package"):
        fake.store().places()


def test_layers_of_another_size_than_the_manifest_makes_are_refused(
    fake: FakeRegistry, package: Package
) -> None:
    put(fake.store(), package)
    key = REPOSITORY, version_tag(place_of(package))
    kind, data = fake.manifests[key]
    value = json.loads(data)
    value["layers"][1]["size"] += 512
    fake.manifests[key] = kind, json.dumps(value).encode()
    with pytest.raises(CorruptError, match="layer"):
        read(fake.store(), package)
    expected = (package.dir / "engine/second.bin").read_bytes()
    assert read(fake.store(), package, "engine/second.bin") == expected


def test_who_may_push_hides_no_statement_from_a_registry_that_lists_referrers(
    fake: FakeRegistry, package: Package
) -> None:
    put(fake.store(), package)
    place, yank = place_of(package), raw_statement("yank")
    fake.store().put_statement(place, yank)
    junk = fake.manifests[REPOSITORY, version_tag(place)]
    fake.manifests[REPOSITORY, statement_tag(place, yank.name)] = junk
    found = {one.name: one.envelope for one in fake.store().read_statements(place)}
    assert found[yank.name] == yank.envelope
    fake.native = False  # then who may push may hide; docs/reliability.md says so
    assert yank.name not in {one.name for one in fake.store().read_statements(place)}


def test_a_thousand_junk_statements_hide_no_yank_and_stop_nothing(
    fake: FakeRegistry, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.registry.store.MAX_PER_KIND", 4)
    store = fake.store()
    put(store, package)
    place = place_of(package)
    for number in range(12):
        junk = RawStatement(name=f"test-{number:016x}", files={ENVELOPE: b"junk"})
        store.put_statement(place, junk)
    store.put_statement(place, raw_statement("yank"))
    kinds = [one.kind for one in store.read_statements(place)]
    assert kinds == ["yank", "signature", "provenance", *["test"] * 4]
