"""Credentials, tokens, redirects: against a registry that asks, over real HTTP."""

from __future__ import annotations

import pytest

from pipeline.core.errors import AccessError
from pipeline.core.published import Package
from pipeline.registry.stores.oci import writing
from tests.registry.packages import place_of
from tests.registry.stores.faulty import answering, running, spoil
from tests.registry.stores.oci.conftest import assert_readable, put, read
from tests.registry.stores.oci.server import BASIC, PASSWORD, USER, FakeRegistry, Handler


def log_in(monkeypatch: pytest.MonkeyPatch, fake: FakeRegistry, password: str = PASSWORD) -> None:
    monkeypatch.setenv("ENGINESMITH_OCI_HOST", fake.host)
    monkeypatch.setenv("ENGINESMITH_OCI_USERNAME", USER)
    monkeypatch.setenv("ENGINESMITH_OCI_PASSWORD", password)


@pytest.mark.parametrize("auth", ["bearer", "basic"])
def test_who_has_a_password_gets_in_and_it_goes_to_the_token_service_alone(
    fake: FakeRegistry, package: Package, auth: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.auth = auth
    log_in(monkeypatch, fake)
    store = fake.store()
    store.check_writable()
    assert put(store, package)
    assert_readable(store, package)
    asked = [one.path for one in fake.seen if one.path.startswith("/token")]
    assert (len(asked) <= 6) if auth == "bearer" else not asked
    if auth == "bearer":
        told = [one.path[:6] for one in fake.seen if one.headers.get("Authorization") == BASIC]
        assert set(told) == {"/token"}


@pytest.mark.parametrize("auth", ["bearer", "basic"])
@pytest.mark.parametrize("password", ["", "wr0ng"])
def test_no_or_wrong_credentials_are_refused_at_once_and_never_shown(
    fake: FakeRegistry,
    package: Package,
    auth: str,
    password: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake.auth = auth
    if password:
        log_in(monkeypatch, fake, password)
    with pytest.raises(AccessError, match="ENGINESMITH_OCI_HOST") as caught:
        put(fake.store(), package)
    assert len(fake.seen) <= 3
    assert "wr0ng" not in str(caught.value)
    assert "wr0ng" not in repr(fake.store())


def test_a_token_that_ended_is_renewed_once(
    fake: FakeRegistry, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.auth = "bearer"
    log_in(monkeypatch, fake)
    store = fake.store()
    put(store, package)
    fake.tokens.clear()
    assert_readable(store, package)

    def revoke(handler: Handler) -> bool:
        fake.tokens.clear()
        return False

    fake.fail("GET", "", revoke, times=9)
    with pytest.raises(AccessError):
        fake.store().read_manifest(place_of(package))


def test_a_token_that_ends_during_an_upload_is_renewed(
    fake: FakeRegistry, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "PART_BYTES", 256 << 10)
    fake.auth = "bearer"
    log_in(monkeypatch, fake)

    def revoke(handler: Handler) -> bool:
        fake.tokens.clear()
        return False

    fake.fail("PATCH", "", spoil(), times=3)
    fake.fail("PATCH", "", revoke)
    assert put(fake.store(), package)
    assert_readable(fake.store(), package)


def test_a_redirect_to_another_host_gets_no_credentials(
    fake: FakeRegistry, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.auth = "bearer"
    log_in(monkeypatch, fake)
    with running(FakeRegistry()) as other:
        other.blobs = fake.blobs
        put(fake.store(), package)
        fake.blobs_at = other.host
        assert_readable(fake.store(), package)
        assert other.seen
        fake.auth = ""
        other.auth = "bearer"  # it sends us to its own realm, which is not told the password
        with pytest.raises(AccessError) as caught:
            read(fake.store(), package)
        assert all("Authorization" not in one.headers for one in other.seen)
        assert "signature=hidden" not in str(caught.value)


def test_an_upload_is_sent_to_no_other_host(fake: FakeRegistry, package: Package) -> None:
    with running(FakeRegistry()) as other:
        elsewhere = f"http://{other.host}/v2/engines/tiny/blobs/uploads/1"
        away = answering(lambda handler: handler.answer(202, Location=elsewhere))
        fake.fail("POST", "/uploads/", away)
        with pytest.raises(AccessError, match="another host"):
            put(fake.store(), package)
        assert other.seen == []
