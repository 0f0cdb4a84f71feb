"""Reads from a registry that misbehaves, over real HTTP."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from email.utils import formatdate

import pytest

from pipeline.core.errors import (
    AccessError,
    CorruptError,
    NotFoundError,
    TransientError,
)
from pipeline.registry.stores.oci import distribution
from tests.registry.stores.oci.conftest import Sealed, plan, put
from tests.registry.stores.oci.server import (
    FakeRegistry,
    Handler,
    once,
)


def test_a_redirect_that_never_ends_is_a_passing_fault(fake: FakeRegistry, sealed: Sealed) -> None:
    put(fake.store(), sealed)
    fake.blobs_at = fake.host
    with pytest.raises(TransientError, match="redirects"):
        plan(fake.store(), sealed)


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


@pytest.mark.parametrize(
    "act",
    [
        lambda h: h.error(429, "TOOMANYREQUESTS", Retry_After="0"),
        lambda h: h.error(503, "UNAVAILABLE"),
        lambda h: h.answer(500, b"<html>", "text/html"),
        lambda h: h.reset(),
        lambda h: h.answer(200, b"\x1f\x8b", Content_Encoding="gzip"),
        lambda h: time.sleep(0.6),
    ],
    ids=["429", "503", "500", "reset", "gzip", "stall"],
)
def test_a_passing_fault_of_any_request_is_tried_again(
    fake: FakeRegistry, sealed: Sealed, act: Callable[[Handler], None]
) -> None:
    store = fake.store(timeout_s=0.3)
    hit = set()

    def fault(handler: Handler) -> bool:
        for call in CALLS:
            if handler.command == call[0] and call[1] in handler.path and call not in hit:
                hit.add(call)
                act(handler)
                return True
        return False

    fake.faults.append(fault)
    assert put(store, sealed)
    sealed.assert_readable(store)
    assert hit == set(CALLS)


def test_a_document_that_ends_early_is_asked_again(fake: FakeRegistry, sealed: Sealed) -> None:
    put(fake.store(), sealed)
    for part in ("/manifests/", "/referrers/"):
        fake.faults.append(
            once("GET", part=part, act=lambda h: h.answer(200, b"{", Content_Length="1000"))
        )
    assert len(fake.store().statements(sealed.place)) == 2
    assert len(fake.paths("GET")) > 4


def test_a_fault_that_stays_ends_after_a_bounded_number_of_attempts(
    fake: FakeRegistry, sealed: Sealed
) -> None:
    put(fake.store(), sealed)
    unavailable = once("GET", part="", act=lambda h: h.error(503, "UNAVAILABLE"), times=99)
    fake.faults.append(unavailable)
    fake.seen.clear()
    with pytest.raises(TransientError, match="503"):
        fake.store().read_manifest(sealed.place)
    assert len(fake.seen) == 5


def test_a_registry_that_does_not_see_its_blobs_yet_is_asked_again(
    fake: FakeRegistry, sealed: Sealed
) -> None:
    unseen = once("PUT", part="/manifests/", act=lambda h: h.error(400, "MANIFEST_BLOB_UNKNOWN"))
    fake.faults.append(unseen)
    assert put(fake.store(), sealed)
    sealed.assert_readable(fake.store())


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_obeyed(fake: FakeRegistry, as_date: bool) -> None:
    value = formatdate(time.time() + 2, usegmt=True) if as_date else "1"
    fake.faults.append(
        once("GET", part="tags", act=lambda h: h.error(429, "TOOMANY", Retry_After=value))
    )
    began = time.monotonic()
    assert fake.store().variants("tiny") == []
    assert time.monotonic() - began > 0.9


def test_a_server_that_ignores_range_still_gives_the_right_bytes_within_a_bound(
    fake: FakeRegistry, sealed: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(fake.store(), sealed)
    fake.ranges = False
    sealed.assert_readable(fake.store())
    monkeypatch.setattr(distribution, "_MAX_SKIP_BYTES", 100_000)
    assert plan(fake.store(), sealed) == sealed.data(sealed.file("model.plan"))
    with pytest.raises(TransientError, match="ignores Range"):
        plan(fake.store(), sealed, 500_000)


@pytest.mark.parametrize("cut", [0, 1000, 500_000])
def test_a_body_that_ends_early_is_noticed_while_it_is_read(
    fake: FakeRegistry, sealed: Sealed, cut: int
) -> None:
    store = fake.store()
    put(store, sealed)
    data = sealed.data(sealed.file("model.plan"))

    def short(handler: Handler) -> bool:
        if "/blobs/" not in handler.path or "bytes=1536-" not in handler.headers.get("Range", ""):
            return False
        extent = f"bytes 1536-{1535 + len(data)}/99999999"
        length = str(len(data))
        handler.answer(206, data[:cut], "a/b", Content_Range=extent, Content_Length=length)
        return True

    store.read_manifest(sealed.place)
    fake.faults.append(short)
    with pytest.raises(TransientError):
        plan(store, sealed)


def test_a_range_that_was_not_asked_is_refused(fake: FakeRegistry, sealed: Sealed) -> None:
    store = fake.store()
    put(store, sealed)
    plan(store, sealed)
    wrong = once(
        "GET", part="/blobs/", act=lambda h: h.answer(206, b"x", Content_Range="bytes 0-0/1")
    )
    fake.faults.append(wrong)
    with pytest.raises(TransientError, match="another range"):
        plan(store, sealed)


def test_the_callers_own_fault_is_not_taken_for_one_of_the_connection(
    fake: FakeRegistry, sealed: Sealed
) -> None:
    store = fake.store()
    put(store, sealed)

    def write() -> None:
        with store.open_file(sealed.place, sealed.file("model.plan")) as chunks:
            for _ in chunks:
                raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()


GARBAGE = [
    *(b"", b"null", b"[]", b"{}", b"{" * 100_000, b"\xff", b"<html>"),
    *(b'{"manifests": 3}', b'{"manifests": [{"size": -1}]}'),
    *(b'{"tags": [3]}', b'{"repositories": {"a": 1}}'),
]


@pytest.mark.parametrize("kind", ["application/json", "text/html"])
@pytest.mark.parametrize("body", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_never_taken_for_an_answer(
    fake: FakeRegistry, sealed: Sealed, body: bytes, kind: str
) -> None:
    put(fake.store(), sealed)
    fake.faults.append(once("GET", part="", act=lambda h: h.answer(200, body, kind), times=99))
    store = fake.store()
    calls: list[Callable[[], object]] = [
        lambda: store.read_manifest(sealed.place),
        lambda: store.channels("tiny", sealed.place.variant),
        lambda: store.moves("tiny", sealed.place.variant),
        lambda: store.statements(sealed.place),
        store.names,
        lambda: store.variants("tiny"),
    ]
    for call in calls[:4]:
        with pytest.raises(TransientError if kind == "text/html" else CorruptError):
            call()
    for call in calls[4:]:
        with contextlib.suppress(CorruptError, TransientError):
            assert call() == []


def test_a_document_that_is_too_long_or_not_the_one_asked_is_refused(
    fake: FakeRegistry, sealed: Sealed
) -> None:
    store = fake.store()
    put(store, sealed)
    document = store._require(sealed.place).document
    other = document.data.replace(b"1970", b"1971")
    acts: list[Callable[[Handler], None]] = [
        lambda h: h.answer(200, other, Docker_Content_Digest=document.digest),
        lambda h: h.answer(200, b"{" + b" " * (4 << 20) + b"}"),
        lambda h: h.answer(200, b"{}", Docker_Content_Digest="sha256:" + "0" * 64),
    ]
    for act in acts:
        fake.faults[:] = [once("GET", part="/manifests/", act=act, times=9)]
        with pytest.raises(CorruptError):
            store.read_manifest(sealed.place)


def test_a_registry_of_another_kind_says_what_it_wants(fake: FakeRegistry, sealed: Sealed) -> None:
    fake.faults.append(once("POST", part="/uploads/", act=lambda h: h.error(405, "UNSUPPORTED")))
    with pytest.raises(AccessError, match="read-only"):
        fake.store().check_writable()
    fake.faults[:] = [once("POST", part="/uploads/", act=lambda h: h.error(403, "DENIED"))]
    with pytest.raises(AccessError, match="ENGINESMITH_OCI_USERNAME"):
        fake.store().check_writable()
    fake.faults[:] = [once("GET", part="_catalog", act=lambda h: h.error(404, "NO"))]
    with pytest.raises((AccessError, NotFoundError)):
        fake.store().names()


def test_layers_of_another_size_than_the_manifest_makes_are_refused(
    fake: FakeRegistry, sealed: Sealed
) -> None:
    store = fake.store()
    put(store, sealed)
    image = store._require(sealed.place)
    value = json.loads(image.document.data)
    value["layers"][1]["size"] += 512
    repository, tag = "engines/tiny", f"{sealed.place.variant}_{sealed.place.version}"
    fake.manifests[repository, tag] = (image.document.media_type, json.dumps(value).encode())
    with pytest.raises(CorruptError, match="layer"):
        plan(fake.store(), sealed)
    with fake.store().open_file(sealed.place, sealed.file("second.bin")) as chunks:
        assert b"".join(chunks) == sealed.data(sealed.file("second.bin"))
