"""What only an OCI registry can do to us; test_network.py has what any server can."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.core.errors import CorruptError
from pipeline.core.published import Package
from pipeline.registry.store import ENVELOPE
from pipeline.registry.stores.oci import reading, writing
from pipeline.registry.stores.oci.address import statement_tag, version_tag
from pipeline.registry.stores.oci.image import MANIFEST_TYPE, digest_of
from tests.registry.packages import place_of, raw_statement
from tests.registry.stores.faulty import answering, refusing
from tests.registry.stores.oci.conftest import assert_readable, put, read
from tests.registry.stores.oci.server import FakeRegistry, Handler

REPOSITORY = "engines/tiny"


def test_an_upload_goes_on_where_the_registry_says_that_it_stopped(
    fake: FakeRegistry, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "PART_BYTES", 256 << 10)
    fake.fail("PATCH", "/uploads/", refusing(416, "BLOB_UPLOAD_INVALID"))
    fake.fail("PATCH", "/uploads/", refusing(404, "BLOB_UPLOAD_UNKNOWN"))
    sent: list[int] = []
    assert fake.store().put_package(
        package, [raw_statement(), raw_statement("provenance")], sent.append
    )
    assert_readable(fake.store(), package)
    assert sum(sent) == sum(file["size"] for file in package.manifest["files"])


def test_a_registry_that_does_not_see_its_blobs_yet_is_asked_again(
    fake: FakeRegistry, package: Package
) -> None:
    fake.fail("PUT", "/manifests/", refusing(400, "MANIFEST_BLOB_UNKNOWN"))
    assert put(fake.store(), package)
    assert_readable(fake.store(), package)


def test_retry_after_is_obeyed(fake: FakeRegistry) -> None:
    fake.fail("GET", "tags", refusing(429, "TOOMANY", Retry_After="1"))
    began = time.monotonic()
    assert fake.store().places("tiny") == []
    assert time.monotonic() - began > 0.9


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
        fake.heal()
        fake.fail("GET", "/manifests/", answering(act), times=9)
        with pytest.raises(CorruptError):
            fake.store().read_manifest(place_of(package))


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


def test_many_of_one_name_hide_no_yank(fake: FakeRegistry, package: Package) -> None:
    """Nor do they where the tag of it is moved, and the registry lists the newest first."""
    store: Any = fake.store()
    put(store, package)
    place, yank = place_of(package), raw_statement("yank")
    store.put_statement(place, yank)
    subject = writing.describe(store.image(place).document, MANIFEST_TYPE)
    for number in range(40):
        document = store.repository("tiny").put_artifact(
            reading.STATEMENT_TYPE,
            {ENVELOPE: b"%d" % number},
            subject=subject,
            annotations={reading.NAME: yank.name},
        )
        for reference in (digest_of(document), statement_tag(place, yank.name)):
            store.repository("tiny").put_manifest(reference, document)
    fake.manifests = dict(reversed(fake.manifests.items()))
    found = fake.store().read_statements(place)
    assert [one.envelope for one in found if one.kind == "yank"] == [yank.envelope]


def test_a_thousand_junk_statements_hide_no_yank_and_stop_nothing(
    fake: FakeRegistry, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.registry.store.MAX_PER_KIND", 4)
    store = fake.store()
    put(store, package)
    place = place_of(package)
    for number in range(12):
        store.put_statement(place, raw_statement("test", str(number)))
    store.put_statement(place, raw_statement("yank"))
    kinds = [one.kind for one in store.read_statements(place)]
    assert kinds == ["yank", "signature", "provenance", *["test"] * 4]


def test_yanks_that_are_too_many_to_read_stop_the_pull_of_their_package(
    fake: FakeRegistry, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry does not date them, so that a true one could be any."""
    monkeypatch.setattr("pipeline.registry.stores.oci.reading.MAX_PER_KIND", 4)
    store = fake.store()
    put(store, package)
    place = place_of(package)
    for number in range(4):
        store.put_statement(place, raw_statement("yank", str(number)))
    assert len([one for one in store.read_statements(place) if one.kind == "yank"]) == 4
    store.put_statement(place, raw_statement("yank", "4"))
    with pytest.raises(CorruptError, match="5 yanks, 4 are read at most"):
        store.read_statements(place)
