"""HTTP to a registry: authorization, redirects, bounded retries, and errors that say what to do."""

from __future__ import annotations

import contextlib
import json
import os
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, MaxRetryError, SSLError
from urllib3.response import BaseHTTPResponse

from pipeline.core.errors import (
    AccessError,
    CorruptError,
    NotFoundError,
    PipelineError,
    TransientError,
)
from pipeline.registry.stores.oci.address import is_loopback
from pipeline.registry.stores.oci.auth import Authorizer, Credentials, keeps_secrets
from pipeline.registry.stores.oci.documents import MAX_DOCUMENT_BYTES
from pipeline.registry.stores.transfer import (
    ATTEMPTS,
    CHUNK_BYTES,
    CONNECT_S,
    CONNECTIONS,
    SILENCE_S,
    at_pace,
    joined,
    timed_pools,
)

BACKOFF_S = 0.5
"""Before the third attempt; doubled for each further one, and lengthened at random."""
_MAX_WAIT_S = 20
"""Longest wait that a `Retry-After` gets."""
_MAX_REDIRECTS = 5
_MAX_SMALL_BYTES = 1 << 20
"""Of a reply that needs no body: an error, a token."""
_BUSY = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to ask.

    Attributes:
        method: HTTP method.
        url: Absolute.
        scope: What it needs, such as `repository:a/b:pull`.
        doing: For messages: `read from a/b`.
        also: Statuses that are answers besides those from 200 to 299; all others raise.
        headers: Besides ours.
        body: What to send.
    """

    method: str
    url: str
    scope: str
    doing: str
    also: tuple[int, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer, read whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str

    @property
    def media_type(self) -> str:
        """Of the body, without parameters."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip()


class Transport:
    """Connections to one registry; several threads may use them, and a forked child makes its own.

    Args:
        api: Start of the registry's URLs.
        credentials: None for anonymous.
    """

    def __init__(self, api: str, credentials: Credentials | None) -> None:
        self.api = api
        self._auth = Authorizer(api=api, credentials=credentials, fetch=self._fetch_token)
        self._pools: dict[tuple[int, str], urllib3.PoolManager] = {}

    def ask(self, request: Request, limit_bytes: int = MAX_DOCUMENT_BYTES) -> Reply:
        """Ask, again after a passing fault, and read the answer whole.

        Raises:
            AccessError: Not allowed.
            NotFoundError: 404, which was not expected.
            CorruptError: Longer than `limit_bytes`, or the server says our bytes are damaged.
            TransientError: Still no answer after `ATTEMPTS`.
            PipelineError: Any other refusal.
        """
        for _ in range(ATTEMPTS - 1):  # a reply that breaks off is like one that does not come
            with contextlib.suppress(_BrokenError):
                return self._ask(request, limit_bytes)
        return self._ask(request, limit_bytes)

    @contextlib.contextmanager
    def open(self, request: Request) -> Iterator[tuple[Reply, Iterator[bytes]]]:
        """Ask, again after a passing fault, and leave the body to the caller, in chunks.

        Yields:
            The reply without its body, and the chunks. A fault of the connection while they are
            read is a TransientError.
        """
        response = self._respond(request)
        reply = Reply(status=response.status, headers=response.headers, body=b"", url=request.url)
        try:
            yield reply, at_pace(_reader(response, request.url), _shown(request.url))
        finally:
            _discard(response)

    def is_own(self, url: str) -> bool:
        """Whether a URL is of the registry itself."""
        return urlsplit(url)[:2] == urlsplit(self.api)[:2]

    def _ask(self, request: Request, limit_bytes: int) -> Reply:
        with self.open(request) as (reply, chunks):
            body = joined(chunks, limit_bytes, _shown(request.url))
        return Reply(status=reply.status, headers=reply.headers, body=body, url=request.url)

    def _respond(self, request: Request) -> BaseHTTPResponse:
        """Send, with authorization; the body of an expected reply is not read yet."""
        response, url, sent = self._send(request)
        # Only the registry itself may ask who we are, not where it redirects to.
        if response.status == 401 and self.is_own(url):
            _discard(response)
            challenge = response.headers.get("WWW-Authenticate", "")
            if not self._auth.answer(request.scope, challenge, sent):
                raise self._auth.refused(request.doing)
            response, _, _ = self._send(request)
        try:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise TransientError(
                    f"{_shown(request.url)} is compressed on the way, which was refused; is a "
                    "proxy in the way?"
                )
            if response.status // 100 != 2 and response.status not in request.also:
                raise self._fault(request, response)
            if response.length_remaining is None and not getattr(response, "chunked", False):
                # Then its end could be a connection that broke.
                raise TransientError(f"{_shown(request.url)} comes without its size; try again")
        except BaseException:
            _discard(response)
            raise
        return response

    def _send(self, request: Request) -> tuple[BaseHTTPResponse, str, str | None]:
        """Send, follow redirects of reads; also gives the last URL and `Authorization`."""
        url = request.url
        for _ in range(_MAX_REDIRECTS + 1):
            headers = {"Accept-Encoding": "identity", **request.headers}
            sent = self._auth.header(request.scope) if self.is_own(url) else None
            if sent:  # never to another host: it gets a link of its own
                headers["Authorization"] = sent
            response = self._open(request.method, url, headers, request.body or None)
            target = response.get_redirect_location()
            if not target or request.method not in {"GET", "HEAD"}:
                return response, url, sent
            _discard(response)
            found = urljoin(url, target)
            if not keeps_secrets(found) and not url.startswith("http:"):
                raise AccessError(f"{_shown(url)} redirects to {_shown(found)}, which is not https")
            url = found
        raise TransientError(f"{_shown(request.url)} redirects more than {_MAX_REDIRECTS} times")

    def _open(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> BaseHTTPResponse:
        retries = urllib3.Retry(
            total=ATTEMPTS - 1,
            allowed_methods=None,  # all: names follow from bytes, so nothing is made twice
            status_forcelist=_BUSY,
            raise_on_status=False,
            backoff_factor=BACKOFF_S,
            backoff_jitter=BACKOFF_S,
            retry_after_max=_MAX_WAIT_S,
        )
        with _connection_errors(url):
            return self._pool(url).urlopen(
                method,
                url,
                body=body,
                headers=headers,
                retries=retries,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )

    def _fault(self, request: Request, response: BaseHTTPResponse) -> PipelineError:
        """What an unexpected status means."""
        status = response.status
        stated = _stated(response)
        message = f"cannot {request.doing}: {_shown(request.url)} answered {status}{stated}"
        if status in {401, 403}:
            return self._auth.refused(request.doing)
        if status in _BUSY or status >= 500:
            return TransientError(f"{message}; try again later")
        if "MANIFEST_BLOB_UNKNOWN" in stated:
            # docker-registry 2.8 does not see a blob while another client uploads the same one
            # (tried 2026-11-25); others take a moment to see what was uploaded.
            return TransientError(f"{message}; run the same command again")
        if status == 404:
            return NotFoundError(message)
        if "DIGEST_INVALID" in stated:
            return CorruptError(f"{message}; what arrived is not what was sent, or a file changed")
        if status == 405:
            what = "deleting (storage.delete.enabled of docker-registry)"
            what = what if request.method == "DELETE" else "writing (it may be read-only just now)"
            return AccessError(f"{message}; switch on {what} in the registry's configuration")
        return PipelineError(f"{message}; is this an OCI registry, and does it take artifacts?")

    def _fetch_token(self, url: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        response = self._open("GET", url, {"Accept-Encoding": "identity", **headers}, None)
        try:
            if response.status in _BUSY:
                raise TransientError(f"{_shown(url)} answered {response.status}; try again later")
            chunks = at_pace(_reader(response, url), _shown(url))
            return response.status, joined(chunks, _MAX_SMALL_BYTES, _shown(url))
        finally:
            _discard(response)

    def _pool(self, url: str) -> urllib3.PoolManager:
        """Connections for a URL, through the proxy that the environment names for it."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        proxy = urllib.request.getproxies().get(parts.scheme, "")
        if is_loopback(host) or urllib.request.proxy_bypass(host):
            proxy = ""
        key = (os.getpid(), proxy)
        if key not in self._pools:
            pools = urllib3.ProxyManager(proxy) if proxy else urllib3.PoolManager()
            pools.connection_pool_kw |= {
                "maxsize": CONNECTIONS,
                "blocksize": CHUNK_BYTES,
                "timeout": urllib3.Timeout(connect=CONNECT_S, read=SILENCE_S),
            }
            self._pools[key] = pools
            pools.pool_classes_by_scheme = timed_pools(HTTPConnection, HTTPSConnection)
        return self._pools[key]


class _BrokenError(TransientError):
    """The connection broke; another attempt may not."""


@contextlib.contextmanager
def _connection_errors(url: str) -> Iterator[None]:
    """Turn a fault of the connection into an error that says what to do."""
    try:
        yield
    except (HTTPError, OSError) as error:
        cause = error.reason if isinstance(error, MaxRetryError) else error
        if isinstance(cause, SSLError):
            raise AccessError(
                f"{_shown(url)} has no TLS certificate that this machine trusts ({cause}); "
                "set SSL_CERT_FILE, or plain_http for a registry that speaks HTTP"
            ) from error
        raise _BrokenError(
            f"the connection to {_shown(url)} broke: {cause}; check the network, and try again"
        ) from error


def _reader(response: BaseHTTPResponse, url: str) -> Callable[[int], bytes]:
    """Reads what has arrived of a body."""

    def read(count: int) -> bytes:
        with _connection_errors(url):
            return response.read1(count, decode_content=False)

    return read


def _discard(response: BaseHTTPResponse) -> None:
    """Give the connection back if the body was read, else close it."""
    if response.length_remaining == 0:
        response.drain_conn()
        response.release_conn()
    else:
        response.close()


def _shown(url: str) -> str:
    """A URL for a message: its query may hold a signature, and a server may have chosen it."""
    parts = urlsplit(url)
    return _printable(f"{parts.scheme}://{parts.netloc}{parts.path}"[:300])


def _stated(response: BaseHTTPResponse) -> str:
    """What the registry says of an error, made printable; empty if nothing."""
    with contextlib.suppress(
        PipelineError, HTTPError, OSError, ValueError, TypeError, KeyError, AttributeError
    ):
        body = joined(at_pace(_reader(response, ""), "an error"), _MAX_SMALL_BYTES, "an error")
        texts = [f"{one['code']} {one.get('message', '')}" for one in json.loads(body)["errors"]]
        return ": " + _printable("; ".join(texts)[:300])
    return ""


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
