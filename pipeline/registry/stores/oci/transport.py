"""HTTP to a registry: credentials, tokens, redirects, bounded retries, errors that say what to do.

Credentials (login.py) go to the host that they are for, and to its token service: the same host, or
one of the same domain. They go in clear to this machine only. Nothing of them is ever logged or put
into a message.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, MaxRetryError, SSLError
from urllib3.response import BaseHTTPResponse

from pipeline.core import errors
from pipeline.core.errors import AccessError, CorruptError, PipelineError, TransientError
from pipeline.core.patience import Patience
from pipeline.registry.stores import transfer
from pipeline.registry.stores.oci.urls import is_loopback, joined, keeps_secrets, shown

if TYPE_CHECKING:
    from pipeline.registry.stores.oci.login import Credentials

BACKOFF_S = 0.5
"""Before the third attempt; doubled for each further one, and lengthened at random."""
_MAX_WAIT_S = 20
"""Longest wait that a `Retry-After` gets."""
_MAX_REDIRECTS = 5
_MAX_SMALL_BYTES = 1 << 20
"""Of a reply that needs no body: an error, a token."""
_BUSY = (408, 429, 500, 502, 503, 504)

_PARAMETER = re.compile(r'([A-Za-z_]+)="([^"]*)"')


@dataclass(frozen=True)
class HttpRequest:
    """What to ask."""

    method: str
    repository: str  # such as `engines/phi3`; empty for the registry itself
    path: str  # below the repository, or a URL that the registry gave
    also: tuple[int, ...] = ()  # answers besides those from 200 to 299; all others raise
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    push: bool = False  # it is a part of pushing, whatever its method

    @property
    def actions(self) -> str:
        """What the registry has to allow."""
        if self.push or self.method in {"PUT", "POST", "PATCH"}:
            return "pull,push"
        return "delete" if self.method == "DELETE" else "pull"

    @property
    def scope(self) -> str:
        if not self.repository:
            return "registry:catalog:*"
        return f"repository:{self.repository}:{self.actions}"

    def __str__(self) -> str:
        verb = {"pull": "read from", "delete": "delete from"}.get(self.actions, "upload to")
        return f"{verb} {self.repository}"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer; `url` is where it was asked for."""

    status: int
    headers: Mapping[str, str]
    url: str
    body: bytes = b""

    @property
    def is_page(self) -> bool:
        """Whether it is a web page, which no registry sends."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip() == "text/html"


class Transport:
    """Connections to a registry; several threads may use them, and a forked child makes its own.

    `api` is the start of the registry's URLs, `host` what credentials are for, as users write it.
    """

    def __init__(self, api: str, host: str) -> None:
        self.api = api
        self._host = host
        self._tokens: dict[str, str] = {}
        """Scope -> value of `Authorization`; one that has ended is refused, and then renewed."""
        self._basic = False
        self._lock = threading.Lock()
        self._patience = Patience()
        self._pools: dict[tuple[int, str], urllib3.PoolManager] = {}

    @functools.cached_property
    def credentials(self) -> Credentials | None:
        """The user's, read when the registry first asks; None for anonymous."""
        from pipeline.registry.stores.oci.login import find_credentials

        return find_credentials(self._host, os.environ)

    def _header(self, scope: str) -> str | None:
        """Value of `Authorization` for a request, as far as is known what the registry wants."""
        with self._lock:
            if self._basic and self.credentials:
                return self.credentials.header()
            return self._tokens.get(scope)

    def log_in(self, scope: str, challenge: str, sent: str | None) -> bool:
        """Get what a 401 asks for, by its `WWW-Authenticate`; False if that was offered already."""
        from pipeline.registry.stores.oci.login import token_for

        kind, _, rest = challenge.partition(" ")
        if self.credentials is not None and not keeps_secrets(self.api):
            raise AccessError(f"{self.api} wants credentials in clear; use a registry with TLS")
        with self._lock:
            if kind.lower() == "basic":
                self._basic = self.credentials is not None
                return self.credentials is not None and sent != self.credentials.header()
            if kind.lower() != "bearer":
                return False
            if self._tokens.get(scope, sent) == sent:  # else a thread got one just now
                asked = {"scope": scope, **dict(_PARAMETER.findall(rest))}
                fetch = self._fetch_token
                self._tokens[scope] = token_for(self.api, self.credentials, fetch, asked)
            return True

    def ask(self, request: HttpRequest, limit_bytes: int) -> Reply:
        """Ask, again after a passing fault, and read the answer whole.

        CorruptError if it is longer than `limit_bytes`, or the server says our bytes are damaged.
        """
        for attempt in range(1, transfer.ATTEMPTS):  # a reply that breaks off is like none
            with contextlib.suppress(_AgainError):
                return self._ask(request, limit_bytes)
            time.sleep(BACKOFF_S * 2**attempt * random.uniform(0.1, 0.2))
        return self._ask(request, limit_bytes)

    @contextlib.contextmanager
    def open(self, request: HttpRequest) -> Iterator[tuple[Reply, Iterator[bytes]]]:
        """Ask, again after a passing fault; the reply without its body, which comes in chunks.

        A fault of the connection while they are read is a TransientError.
        """
        response, url = self._respond(request), self._url(request)
        reply = Reply(status=response.status, headers=response.headers, url=url)
        try:
            yield reply, self._chunks(response, url)
        finally:
            _discard(response)

    def is_own(self, url: str) -> bool:
        return urlsplit(url)[:2] == urlsplit(self.api)[:2]

    def _url(self, request: HttpRequest) -> str:
        if "://" in request.path:
            return request.path
        return "/".join(filter(None, (self.api, "v2", request.repository, request.path)))

    def _ask(self, request: HttpRequest, limit_bytes: int) -> Reply:
        with self.open(request) as (reply, chunks):
            return replace(reply, body=transfer.read_whole(chunks, limit_bytes, shown(reply.url)))

    def _respond(self, request: HttpRequest) -> BaseHTTPResponse:
        response, url, sent = self._send(request)
        # Only the registry itself may ask who we are, not where it redirects to.
        if response.status == 401 and self.is_own(url):
            _discard(response)
            challenge = response.headers.get("WWW-Authenticate", "")
            if not self.log_in(request.scope, challenge, sent):
                raise self._refused(request)
            response, _, _ = self._send(request)
        fault: PipelineError | None = None
        what = shown(self._url(request))
        if response.headers.get("Content-Encoding", "identity") != "identity":
            fault = TransientError(f"{what} is compressed against our wish; is a proxy in the way?")
        elif response.status // 100 != 2 and response.status not in request.also:
            fault = self._fault(request, response)
        elif response.length_remaining is None and not getattr(response, "chunked", False):
            # Then its end could be a connection that broke.
            fault = TransientError(f"{what} comes without its size; try again")
        if fault is not None:
            _discard(response)
            raise fault
        return response

    def _send(self, request: HttpRequest) -> tuple[BaseHTTPResponse, str, str | None]:
        """Send, follow redirects of reads; also gives the last URL and `Authorization`."""
        url = self._url(request)
        for _ in range(_MAX_REDIRECTS + 1):
            headers = dict(request.headers)
            sent = self._header(request.scope) if self.is_own(url) else None
            if sent:  # never to another host: it gets a link of its own
                headers["Authorization"] = sent
            response = self._open(request.method, url, headers, request.body or None)
            target = response.get_redirect_location()
            if not target or request.method not in {"GET", "HEAD"}:
                return response, url, sent
            _discard(response)
            found = joined(url, target)
            if not keeps_secrets(found) and not url.startswith("http:"):
                raise AccessError(f"{shown(url)} redirects to {shown(found)}, which is not https")
            url = found
        raise TransientError(f"{shown(url)} redirects, after {_MAX_REDIRECTS} redirects")

    def _open(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> BaseHTTPResponse:
        retries = urllib3.Retry(
            total=transfer.ATTEMPTS - 1,
            allowed_methods=None,  # all: names follow from bytes, so nothing is made twice
            status_forcelist=_BUSY,
            raise_on_status=False,
            backoff_factor=BACKOFF_S,
            backoff_jitter=BACKOFF_S,
            retry_after_max=_MAX_WAIT_S,
        )
        with _connection_errors(url, TransientError), self._patience.waiting():
            return self._pool(url).urlopen(
                method, url, body=body, headers={"Accept-Encoding": "identity", **headers},
                retries=retries, redirect=False, preload_content=False, decode_content=False,
            )  # fmt: skip

    def _fault(self, request: HttpRequest, response: BaseHTTPResponse) -> PipelineError:
        status, stated = response.status, self._stated(response)
        if status in {401, 403}:
            return self._refused(request)
        message = f"cannot {request}: {shown(self._url(request))} answered {status}{stated}"
        what = "it may be read-only just now, or not delete (storage.delete.enabled)"
        for found, kind, advice in (
            (status in _BUSY or status >= 500, TransientError, "try again later"),
            # docker-registry 2.8 does not see a blob while another client uploads the same one
            # (tried 2026-11-25); others take a moment to see what was uploaded.
            ("MANIFEST_BLOB_UNKNOWN" in stated, _AgainError, "run the same command again"),
            (status == 404, errors.NotFoundError, "check the reference"),
            ("DIGEST_INVALID" in stated, CorruptError, "bytes were damaged, or a file changed"),
            (status == 405, AccessError, f"look at the registry's configuration: {what}"),
        ):
            if found:
                return kind(f"{message}; {advice}")
        return PipelineError(f"{message}; is this an OCI registry, and does it take artifacts?")

    def _refused(self, request: HttpRequest) -> AccessError:
        from pipeline.registry.stores.oci.login import SET_THEM, named

        who = named(self.credentials)
        return AccessError(f"{self.api} does not let {who} {request}; {SET_THEM}")

    def _fetch_token(self, url: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        with contextlib.closing(self._open("GET", url, headers)) as response:
            if response.status in _BUSY:
                raise TransientError(f"{shown(url)} answered {response.status}; try again later")
            chunks = self._chunks(response, url)
            return response.status, transfer.read_whole(chunks, _MAX_SMALL_BYTES, shown(url))

    def _pool(self, url: str) -> urllib3.PoolManager:
        """Connections for a URL, through the proxy that the environment names for it."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        proxy = urllib.request.getproxies().get(parts.scheme, "")
        if is_loopback(host) or urllib.request.proxy_bypass(host):
            proxy = ""
        key = (os.getpid(), proxy)
        if key not in self._pools:
            make = functools.partial(urllib3.ProxyManager, proxy) if proxy else urllib3.PoolManager
            timeout = urllib3.Timeout(connect=transfer.CONNECT_S, read=transfer.SILENCE_S)
            size = transfer.CHUNK_BYTES
            pools = make(maxsize=transfer.CONNECTIONS, blocksize=size, timeout=timeout)
            pools.pool_classes_by_scheme = transfer.timed_pools(
                HTTPConnection, HTTPSConnection, self._patience
            )
            self._pools[key] = pools
        return self._pools[key]

    def _chunks(self, response: BaseHTTPResponse, url: str) -> Iterator[bytes]:
        def read(count: int) -> bytes:
            with _connection_errors(url, _AgainError):
                return response.read1(count, decode_content=False)

        return transfer.at_pace(read, shown(url), self._patience)

    def _stated(self, response: BaseHTTPResponse) -> str:
        with contextlib.suppress(PipelineError, ValueError, TypeError, KeyError, AttributeError):
            chunks = self._chunks(response, "")
            found = json.loads(transfer.read_whole(chunks, _MAX_SMALL_BYTES, "an error"))
            texts = [f"{one['code']} {one.get('message', '')}" for one in found["errors"]]
            return f": {'; '.join(texts)[:300]}"
        return ""


class _AgainError(TransientError):
    """Another attempt may succeed, of what urllib3 does not try again."""


@contextlib.contextmanager
def _connection_errors(url: str, kind: type[TransientError]) -> Iterator[None]:
    try:
        yield
    except (HTTPError, OSError) as error:
        cause = error.reason if isinstance(error, MaxRetryError) else error
        if isinstance(cause, SSLError):
            raise AccessError(
                f"{shown(url)} has no TLS certificate that this machine trusts ({cause}); "
                "set SSL_CERT_FILE"
            ) from error
        raise kind(
            f"the connection to {shown(url)} broke: {cause}; check the network, and try again"
        ) from error


def _discard(response: BaseHTTPResponse) -> None:
    """Give the connection back if the body was read, else close it."""
    if response.length_remaining == 0:
        response.read()
        response.release_conn()
    else:
        response.close()
