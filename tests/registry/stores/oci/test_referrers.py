"""Statements where the registry has the referrers API."""

from __future__ import annotations

import json
from typing import Any

from tests.registry.stores.oci.conftest import STATEMENTS, Sealed, put
from tests.registry.stores.oci.server import (
    FakeRegistry,
    fake_registry,
    once,
)


def test_statements_are_listed_by_the_referrers_api_page_by_page(
    fake: FakeRegistry, sealed: Sealed
) -> None:
    fake.page = 1
    store = fake.store()
    assert put(store, sealed)
    assert store.put_statement(sealed.place, "test-1", {"report.json": b"{}"})
    assert {one.name for one in store.statements(sealed.place)} == {*STATEMENTS, "test-1"}
    assert not any(reference.startswith("sha256-") for _, reference in fake.manifests)
    assert store.names() == ["tiny"]
    assert store.versions("tiny", sealed.place.variant) == [sealed.place.version]
    sealed.assert_readable(store)
    store.delete_version(sealed.place)
    assert fake.manifests == {}


def test_statements_stay_readable_when_a_registry_gets_the_referrers_api(sealed: Sealed) -> None:
    with fake_registry(native=False) as fake:
        put(fake.store(), sealed)
        fake.native = True
        fake.store().put_statement(sealed.place, "test-1", {"a": b"b"})
        found = {one.name for one in fake.store().statements(sealed.place)}
    assert found == {*STATEMENTS, "test-1"}


def test_a_list_of_referrers_that_lags_behind_is_an_empty_list(
    fake: FakeRegistry, sealed: Sealed
) -> None:
    put(fake.store(), sealed)
    empty = b'{"manifests": []}'
    fake.faults.append(once("GET", part="/referrers/", act=lambda h: h.answer(200, empty), times=9))
    assert fake.store().statements(sealed.place) == []


def test_a_statement_that_is_listed_but_not_there_is_left_out(
    fake: FakeRegistry, sealed: Sealed
) -> None:
    put(fake.store(), sealed)
    lost = next(key for key, (_, data) in fake.manifests.items() if b"build-0123" in data)
    listed = fake.referrers
    everything = listed(lost[0], json.loads(fake.manifests[lost][1])["subject"]["digest"])
    body = json.dumps({"manifests": everything}).encode()
    del fake.manifests[lost]
    fake.faults.append(once("GET", part="/referrers/", act=lambda h: h.answer(200, body), times=9))
    assert [one.name for one in fake.store().statements(sealed.place)] == ["model-0123"]


def test_a_statement_about_another_image_is_not_this_ones(
    fake: FakeRegistry, seal_package: Any
) -> None:
    first, second = seal_package(0, "1.0"), seal_package(3, "1.1")
    store = fake.store()
    for sealed in (first, second):
        put(store, sealed)
    store.put_statement(first.place, "test-1", {"report.json": b"{}"})
    digest = store._require(first.place).document.digest
    body = json.dumps({"manifests": fake.referrers("engines/tiny", digest)}).encode()
    fake.faults.append(once("GET", part="/referrers/", act=lambda h: h.answer(200, body), times=9))
    assert {one.name for one in store.statements(first.place)} == {*STATEMENTS, "test-1"}
    assert store.statements(second.place) == []
