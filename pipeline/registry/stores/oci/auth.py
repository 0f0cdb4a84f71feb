"""Who we are to a registry: credentials, Basic, and Bearer tokens (distribution-spec 1.1, "Auth").

Credentials come from ENGINESMITH_OCI_USERNAME and ENGINESMITH_OCI_PASSWORD for the registry that
ENGINESMITH_OCI_HOST names, else from `auths` in Docker's `config.json` ($DOCKER_CONFIG, else
~/.docker), which names hosts, too. Credential helpers are not called.

They go to the host that they are for, and to its token service: the same host, or one of the same
domain. They go in clear to this machine only. Nothing here is ever logged or put into a message.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from pydantic import BaseModel

from pipeline.core.errors import AccessError, CorruptError
from pipeline.registry.stores.oci.address import is_loopback
from pipeline.registry.stores.oci.documents import parse

HOST, USERNAME, PASSWORD = (f"ENGINESMITH_OCI_{part}" for part in ("HOST", "USERNAME", "PASSWORD"))
_SET_THEM = (
    f"set {HOST}, {USERNAME} and {PASSWORD}, or use `docker login` without a credential helper"
)
_HUB, _HUB_KEY = "docker.io", "https://index.docker.io/v1/"
_PARAMETER = re.compile(r'([A-Za-z_]+)="([^"]*)"')


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """A user of a registry."""

    username: str
    password: str = field(repr=False)

    def header(self) -> str:
        """Value of `Authorization`."""
        return f"Basic {base64.b64encode(f'{self.username}:{self.password}'.encode()).decode()}"


def find_credentials(host: str, environ: Mapping[str, str]) -> Credentials | None:
    """The credentials for a registry; None for anonymous.

    Args:
        host: With its port, as the user wrote it.
        environ: The environment.

    Raises:
        AccessError: Docker's `config.json` cannot be read.
    """
    if environ.get(HOST) == host and environ.get(USERNAME) and environ.get(PASSWORD):
        return Credentials(username=environ[USERNAME], password=environ[PASSWORD])
    folder = environ.get("DOCKER_CONFIG") or Path(environ.get("HOME", "~")).expanduser() / ".docker"
    path = Path(folder, "config.json")
    try:
        auths = json.loads(path.read_bytes()).get("auths") or {}
        keys = (host, f"https://{host}", *([_HUB_KEY] if host == _HUB else []))
        found: dict[str, str] = next((auths[key] for key in keys if key in auths), {})
        if not found.get("auth"):
            return None
        username, _, password = base64.b64decode(found["auth"]).decode().partition(":")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError, binascii.Error):
        # The cause might quote the file.
        raise AccessError(f"{path} cannot be read as Docker's configuration; {_SET_THEM}") from None
    return Credentials(username=username, password=password) if password else None


class _Token(BaseModel):
    """What a token service answers (docs.docker.com, "Token authentication specification")."""

    token: str | None = None
    access_token: str | None = None


FetchToken = Callable[[str, Mapping[str, str]], tuple[int, bytes]]
"""GET of a URL with headers -> status and body."""


@dataclass(kw_only=True)
class Authorizer:
    """Keeps the tokens of one registry; several threads may use it.

    Attributes:
        api: Start of the registry's URLs.
        credentials: None for anonymous.
        fetch: How to ask for a token.
    """

    api: str
    credentials: Credentials | None
    fetch: FetchToken
    _tokens: dict[str, str] = field(default_factory=dict, repr=False)
    """Scope -> value of `Authorization`; one that has ended is refused, and then renewed."""
    _basic: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def header(self, scope: str) -> str | None:
        """Value of `Authorization` for a request, as far as is known what the registry wants."""
        with self._lock:
            if self._basic and self.credentials:
                return self.credentials.header()
            return self._tokens.get(scope)

    def answer(self, scope: str, challenge: str, sent: str | None) -> bool:
        """Get what a 401 asks for. False if there is nothing more to offer.

        Args:
            scope: What the request needs, such as `repository:a/b:pull`.
            challenge: The reply's `WWW-Authenticate`.
            sent: The `Authorization` that was refused.

        Raises:
            AccessError: No token for us, or the registry wants a password in clear.
        """
        kind, _, rest = challenge.partition(" ")
        if self.credentials is not None and not keeps_secrets(self.api):
            raise AccessError(
                f"{self.api} wants credentials, which would go there in clear; use a registry "
                "with TLS"
            )
        with self._lock:
            if kind.lower() == "basic":
                self._basic = self.credentials is not None
                return self.credentials is not None and sent != self.credentials.header()
            if kind.lower() != "bearer":
                return False
            if self._tokens.get(scope, sent) == sent:  # else a thread got one just now
                self._tokens[scope] = self._token(
                    {"scope": scope, **dict(_PARAMETER.findall(rest))}
                )
            return True

    def _token(self, challenge: Mapping[str, str]) -> str:
        """Ask the registry's token service; value of `Authorization`."""
        realm = challenge.get("realm", "")
        if not _is_token_service(self.api, realm):
            raise AccessError(
                f"{self.api} sends us for a token to {realm[:80]!r}, which is not of its own "
                "domain or not https; credentials were not sent there"
            )
        query = urlencode({key: challenge.get(key, "") for key in ("service", "scope")})
        headers = {"Authorization": self.credentials.header()} if self.credentials else {}
        status, body = self.fetch(f"{realm}{'&' if '?' in realm else '?'}{query}", headers)
        if status != 200:
            who = repr(self.credentials.username) if self.credentials else "anonymous"
            raise AccessError(
                f"{self.api} refused {who} a token for {challenge['scope']} ({status}); {_SET_THEM}"
            )
        granted = parse(_Token, body, f"the token for {self.api}")
        token = granted.token or granted.access_token
        if not token or not token.isprintable() or not token.isascii():
            raise CorruptError(f"{self.api} was answered without a token; try again later")
        return f"Bearer {token}"

    def refused(self, doing: str) -> AccessError:
        """The error for a request that is not allowed, whatever we offer."""
        who = f"as {self.credentials.username!r}" if self.credentials else "without credentials"
        return AccessError(f"{self.api} does not let us {doing} {who}; {_SET_THEM}")


def keeps_secrets(url: str) -> bool:
    """Whether what is sent to a URL is encrypted, or stays on this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or is_loopback(parts.hostname or "")


def _is_token_service(api: str, realm: str) -> bool:
    """Whether a registry's credentials may go to a token service."""
    ours, theirs = urlsplit(api).hostname or "", urlsplit(realm).hostname or ""
    if urlsplit(realm).scheme not in {"http", "https"} or not keeps_secrets(realm):
        return False
    domain = ".".join(ours.split(".")[-2:])
    named = "." in domain and not ours.replace(".", "").isdecimal()  # an address has no domain
    return theirs == ours or (named and (theirs == domain or theirs.endswith(f".{domain}")))
