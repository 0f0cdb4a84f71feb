"""Credentials for a registry, and a token for one that wants it, from its own service alone.

Credentials come from ENGINESMITH_OCI_USERNAME and ENGINESMITH_OCI_PASSWORD for the registry that
ENGINESMITH_OCI_HOST names, else from `auths` in Docker's `config.json` ($DOCKER_CONFIG, else
~/.docker). Credential helpers are not called.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from pydantic import BaseModel

from pipeline.core.errors import AccessError, CorruptError
from pipeline.registry.disk import read_bounded
from pipeline.registry.stores.oci.image import parse
from pipeline.registry.stores.oci.urls import joined, keeps_secrets

HOST, USERNAME, PASSWORD = (f"ENGINESMITH_OCI_{part}" for part in ("HOST", "USERNAME", "PASSWORD"))
SET_THEM = f"set {HOST}, {USERNAME} and {PASSWORD}, or use `docker login` without a helper"
_HUB, _HUB_KEY = "docker.io", "https://index.docker.io/v1/"
_MAX_CONFIG_BYTES = 1 << 20
FetchToken = Callable[[str, Mapping[str, str]], tuple[int, bytes]]
"""URL, headers -> status and body."""


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """A user of a registry."""

    username: str
    password: str = field(repr=False)

    def header(self) -> str:
        """Value of `Authorization`."""
        return f"Basic {base64.b64encode(f'{self.username}:{self.password}'.encode()).decode()}"


def find_credentials(host: str, environ: Mapping[str, str]) -> Credentials | None:
    """The credentials for a host and port as the user wrote them; None for anonymous."""
    if environ.get(HOST) == host and environ.get(USERNAME) and environ.get(PASSWORD):
        return Credentials(username=environ[USERNAME], password=environ[PASSWORD])
    folder = environ.get("DOCKER_CONFIG") or Path(environ.get("HOME", "~")).expanduser() / ".docker"
    path = Path(folder, "config.json")
    try:
        if not path.exists():
            return None
        auths = (
            json.loads(read_bounded(Path(os.path.realpath(path)), _MAX_CONFIG_BYTES)).get("auths")
            or {}
        )
        keys = (host, f"https://{host}", *([_HUB_KEY] if host == _HUB else []))
        found: dict[str, str] = next((auths[key] for key in keys if key in auths), {})
        secret = base64.b64decode(found.get("auth") or "").decode()
    except (CorruptError, OSError, ValueError, AttributeError, TypeError, RecursionError):
        # The cause might quote the file.
        raise AccessError(f"{path} cannot be read as Docker's configuration; {SET_THEM}") from None
    username, _, password = secret.partition(":")
    return Credentials(username=username, password=password) if password else None


class _Token(BaseModel):
    """Of a token service (docs.docker.com, "Token authentication specification")."""

    token: str | None = None
    access_token: str | None = None


def _is_token_service(api: str, realm: str) -> bool:
    ours, theirs = urlsplit(api).hostname or "", urlsplit(realm).hostname or ""
    if urlsplit(realm).scheme not in {"http", "https"} or not keeps_secrets(realm):
        return False
    domain = ".".join(ours.split(".")[-2:])
    named = "." in domain and not ours.replace(".", "").isdecimal()  # an address has no domain
    return theirs == ours or (named and (theirs == domain or theirs.endswith(f".{domain}")))


def named(credentials: Credentials | None) -> str:
    """Whose they are, for a message."""
    return repr(credentials.username) if credentials else "us, without credentials,"


def token_for(
    api: str, credentials: Credentials | None, fetch: FetchToken, asked: Mapping[str, str]
) -> str:
    """Value of `Authorization` for what a challenge asks; AccessError if it is not given."""
    realm = joined(asked.get("realm", ""), "")
    if not _is_token_service(api, realm):
        raise AccessError(
            f"{api} sends us for a token to {realm[:80]!r}, which is not of its own "
            "domain or not https; credentials were not sent there"
        )
    query = urlencode({key: asked.get(key, "") for key in ("service", "scope")})
    headers = {"Authorization": credentials.header()} if credentials else {}
    status, body = fetch(f"{realm}{'&' if '?' in realm else '?'}{query}", headers)
    if status != 200:
        what = f"a token for {asked['scope']} ({status})"
        raise AccessError(f"{api} refused {named(credentials)} {what}; {SET_THEM}")
    granted = parse(_Token, body, f"the token for {api}")
    token = granted.token or granted.access_token
    if not token or not token.isprintable() or not token.isascii():
        raise CorruptError(f"{api} was answered without a token; try again later")
    return f"Bearer {token}"
