"""Publishing to a registry that misbehaves, over real HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.core.errors import (
    ConflictError,
    CorruptError,
)
from pipeline.registry.stores.oci import upload
from tests.registry.stores.oci.conftest import Sealed, put
from tests.registry.stores.oci.server import (
    FakeRegistry,
    Handler,
    once,
)


def test_bytes_that_changed_on_the_way_up_are_refused_by_the_registry(
    fake: FakeRegistry, sealed: Sealed
) -> None:
    def damage(handler: Handler) -> bool:
        if handler.command == "PUT" and "/uploads/" in handler.path:
            for data in fake.uploads.values():
                if data:
                    data[0] ^= 1
        return False

    fake.faults.append(damage)
    with pytest.raises(CorruptError, match="DIGEST_INVALID") as caught:
        put(fake.store(), sealed)
    assert "state=" not in str(caught.value)  # may be a key to the upload
    assert not any(reference[:6] != "sha256" for _, reference in fake.manifests)


def test_an_upload_goes_on_where_it_stopped(
    fake: FakeRegistry, sealed: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "PART_BYTES", 256 << 10)
    calls = 0

    def lose_reply(handler: Handler) -> bool:
        nonlocal calls
        calls += handler.command == "PATCH"
        if handler.command != "PATCH" or calls not in {3, 6}:
            return False
        if calls == 3:  # the part arrived, its answer is lost
            name = handler.path.partition("?")[0].rpartition("/")[2]
            fake.uploads[name] += handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.reset()
        return True

    fake.faults.append(lose_reply)
    assert put(fake.store(), sealed)
    sealed.assert_readable(fake.store())
    parts = [one for one in fake.seen if one.method == "PATCH"]
    # 1 of the small files, 5 of each large one; one more that was lost without a trace.
    assert len(parts) == 12


def test_an_upload_whose_last_reply_is_lost_is_found_finished(
    fake: FakeRegistry, sealed: Sealed
) -> None:
    def lose_reply(handler: Handler) -> None:
        name = handler.path.partition("?")[0].rpartition("/")[2]
        digest = handler.path.rpartition("digest=")[2].replace("%3A", ":")
        handler.registry.blobs[digest] = bytes(handler.registry.uploads.pop(name))
        handler.reset()

    fake.faults.append(once("PUT", part="/uploads/", act=lose_reply))
    assert put(fake.store(), sealed)
    sealed.assert_readable(fake.store())
    assert len(fake.paths("PATCH")) == 3


def test_a_publisher_whose_tag_was_overwritten_is_told_so(
    fake: FakeRegistry, seal_package: Any
) -> None:
    ours, rival = seal_package(0), seal_package(5)
    put(fake.store("rivals"), rival)
    tag = f"{ours.place.variant}_{ours.place.version}"
    kind, data = fake.manifests["rivals/tiny", tag]

    def overwrite(handler: Handler) -> bool:
        written = any(path.endswith(tag) for path in fake.paths("PUT") if "/engines/" in path)
        if handler.command != "GET" or not handler.path.endswith(f"engines/tiny/manifests/{tag}"):
            return False
        if written:
            handler.answer(200, data, kind)
        return written

    fake.faults.append(overwrite)
    with pytest.raises(ConflictError, match="other bytes"):
        put(fake.store(), ours)
