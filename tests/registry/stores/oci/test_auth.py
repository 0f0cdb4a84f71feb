"""Credentials, tokens, redirects: against a registry that asks, over real HTTP."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from pipeline.core.errors import (
    AccessError,
)
from pipeline.registry.stores.oci import upload
from tests.registry.stores.oci.conftest import Sealed, plan, put
from tests.registry.stores.oci.server import (
    PASSWORD,
    USER,
    Handler,
    basic,
    fake_registry,
)


@pytest.fixture
def login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINESMITH_OCI_USERNAME", USER)
    monkeypatch.setenv("ENGINESMITH_OCI_PASSWORD", PASSWORD)


@pytest.mark.usefixtures("login")
@pytest.mark.parametrize("auth", ["bearer", "basic"])
def test_credentials_open_a_registry(sealed: Sealed, auth: str) -> None:
    with fake_registry(auth=auth) as fake:
        store = fake.store()
        store.check_writable()
        assert put(store, sealed)
        sealed.assert_readable(store)
        asked = [one.path for one in fake.seen if one.path.startswith("/token")]
        assert (len(asked) <= 4) if auth == "bearer" else not asked
        if auth == "bearer":
            password_seen = [
                one for one in fake.seen if one.headers.get("Authorization") == basic()
            ]
            assert {one.path[:6] for one in password_seen} == {"/token"}


def test_docker_login_opens_a_registry(
    sealed: Sealed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with fake_registry(auth="bearer") as fake:
        secret = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        config = {"auths": {fake.host: {"auth": secret}, "other": {}}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert put(fake.store(), sealed)
        (tmp_path / "config.json").write_text('{"auths": ["' + secret)
        with pytest.raises(AccessError) as caught:
            fake.store().names()
        assert secret not in str(caught.value)


@pytest.mark.parametrize("auth", ["bearer", "basic"])
def test_no_or_wrong_credentials_are_refused_at_once_and_never_shown(
    sealed: Sealed, auth: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_registry(auth=auth) as fake:
        for password in ("", "wr0ng"):
            if password:
                monkeypatch.setenv("ENGINESMITH_OCI_USERNAME", USER)
                monkeypatch.setenv("ENGINESMITH_OCI_PASSWORD", password)
            fake.seen.clear()
            with pytest.raises(AccessError, match="ENGINESMITH_OCI_USERNAME") as caught:
                put(fake.store(), sealed)
            assert len(fake.seen) <= 3
            assert "wr0ng" not in str(caught.value)
            assert "wr0ng" not in repr(fake.store())


@pytest.mark.usefixtures("login")
def test_a_token_that_ended_is_renewed_once(sealed: Sealed) -> None:
    with fake_registry(auth="bearer") as fake:
        store = fake.store()
        put(store, sealed)
        fake.tokens.clear()
        sealed.assert_readable(store)
        fake.tokens.clear()

        def revoke(handler: Handler) -> bool:
            fake.tokens.clear()
            return False

        fake.faults.append(revoke)
        with pytest.raises(AccessError):
            store.read_manifest(sealed.place)


@pytest.mark.usefixtures("login")
def test_a_token_that_ends_during_an_upload_is_renewed(
    sealed: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "PART_BYTES", 256 << 10)
    with fake_registry(auth="bearer") as fake:
        parts = 0

        def revoke(handler: Handler) -> bool:
            nonlocal parts
            parts += handler.command == "PATCH"
            if handler.command == "PATCH" and parts == 4:
                fake.tokens.clear()
            return False

        fake.faults.append(revoke)
        assert put(fake.store(), sealed)
        sealed.assert_readable(fake.store())


@pytest.mark.usefixtures("login")
def test_a_redirect_to_another_host_gets_no_credentials(sealed: Sealed) -> None:
    with fake_registry(auth="bearer") as fake, fake_registry(blobs=fake.blobs) as other:
        put(fake.store(), sealed)
        fake.blobs_at = other.host
        sealed.assert_readable(fake.store())
        assert other.seen
        assert all("Authorization" not in one.headers for one in other.seen)
        fake.auth = ""
        other.auth = "bearer"  # it sends us to its own realm: nobody tells it the password
        other.seen.clear()
        with pytest.raises(AccessError) as caught:
            plan(fake.store(), sealed)
        assert all("Authorization" not in one.headers for one in other.seen)
        assert "signature=hidden" not in str(caught.value)
