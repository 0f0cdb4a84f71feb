"""HTTP to a registry: authorization, redirects, bounded retries, and errors that say what to do."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, SSLError
from urllib3.response import BaseHTTPResponse

from pipeline.core.errors import (
    AccessError,
    CorruptError,
    NotFoundError,
    PipelineError,
    TransientError,
)
from pipeline.registry.stores.oci.address import is_loopback
from pipeline.registry.stores.oci.auth import Authorizer, Credentials

log = logging.getLogger(__name__)

ATTEMPTS = 5
BACKOFF_S = 0.5
"""Before the second attempt; doubled for each further one, then shortened at random."""
_MAX_WAIT_S = 60.0
"""Longest wait that a `Retry-After` gets."""
_MAX_REDIRECTS = 5
_MAX_ERROR_BYTES = 64 << 10
_MAX_TOKEN_BYTES = 1 << 20
_CONNECT_S = 10.0
_CONNECTIONS = 32

_Result = TypeVar("_Result")
Body = bytes | Iterable[bytes]


class RetryableError(TransientError):
    """A fault that another attempt may not have.

    Attributes:
        retry_after_s: How long the server wants us to wait; None if it did not say.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{message}; run the same command again")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to ask.

    Attributes:
        method: HTTP method.
        url: Absolute.
        scope: What it needs, such as `repository:a/b:pull`.
        doing: For messages: `read a/b:tag`.
        expect: Statuses that are answers; all others raise.
        headers: Besides ours.
        body: Bytes, or chunks that can be read once.
    """

    method: str
    url: str
    scope: str
    doing: str
    expect: tuple[int, ...]
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body = b""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer, read whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str


class Transport:
    """Connections to one registry; several threads may use them, and a forked child makes its own.

    Args:
        api: Start of the registry's URLs.
        credentials: Whom to be; None for nobody.
        timeout_s: A reply that is silent for so long has stalled.
    """

    def __init__(self, api: str, credentials: Credentials | None, timeout_s: float) -> None:
        self.api = api
        self._auth = Authorizer(api=api, credentials=credentials, fetch=self._fetch_token)
        self._timeout = urllib3.Timeout(connect=_CONNECT_S, read=timeout_s)
        self._pools: dict[tuple[int, str], urllib3.PoolManager] = {}

    def ask(self, request: Request, limit_bytes: int = _MAX_ERROR_BYTES) -> Reply:
        """Ask, again after a passing fault, and read the answer whole.

        Raises:
            AccessError: Not allowed.
            NotFoundError: 404, which was not expected.
            CorruptError: Longer than `limit_bytes`, or the server says our bytes are damaged.
            TransientError: Still no answer after `ATTEMPTS`.
            PipelineError: Any other refusal.
        """
        return retrying(lambda: self.ask_once(request, limit_bytes))

    def ask_once(self, request: Request, limit_bytes: int = _MAX_ERROR_BYTES) -> Reply:
        """`ask`, without a second attempt; for a body that can be read once."""
        response = self._respond(request)
        try:
            with _connection_errors(request):
                body = response.read(limit_bytes + 1, decode_content=False)
            if len(body) > limit_bytes:
                raise CorruptError(f"{_shown(request.url)} is longer than {limit_bytes} bytes")
            if response.length_remaining:
                raise RetryableError(f"{_shown(request.url)} ended early")
        finally:
            _discard(response)
        return Reply(status=response.status, headers=response.headers, body=body, url=request.url)

    @contextlib.contextmanager
    def open(self, request: Request, chunk_bytes: int) -> Iterator[tuple[Reply, Iterator[bytes]]]:
        """Ask, again after a passing fault, and leave the body to the caller, in chunks.

        Yields:
            The reply without its body, and the chunks. A fault of the connection while they are
            read is a TransientError.
        """
        response = retrying(lambda: self._respond(request))
        reply = Reply(status=response.status, headers=response.headers, body=b"", url=request.url)

        def chunks() -> Iterator[bytes]:
            stream = response.stream(chunk_bytes, decode_content=False)
            while True:
                with _connection_errors(request):  # not around the yield: the caller's are his
                    chunk = next(stream, None)
                if chunk is None:
                    return
                yield chunk

        try:
            yield reply, chunks()
        finally:
            _discard(response)

    def _respond(self, request: Request) -> BaseHTTPResponse:
        """Send, with authorization; the body of an expected reply is not read yet."""
        with _connection_errors(request):
            response, url, sent = self._send(request)
            # Only the registry itself may ask who we are, not where it redirects to.
            if response.status == 401 and _origin(url) == _origin(self.api):
                _discard(response)
                challenge = response.headers.get("WWW-Authenticate", "")
                if not self._auth.answer(request.scope, challenge, sent):
                    raise self._auth.refused(request.doing)
                if not isinstance(request.body, bytes):
                    raise RetryableError(f"{_shown(request.url)} wanted a new token")
                response, _, _ = self._send(request)
            try:
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise RetryableError(
                        f"{_shown(request.url)} is compressed on the way, which was refused"
                    )
                if response.status not in request.expect:
                    raise self._fault(request, response)
            except BaseException:
                _discard(response)
                raise
            return response

    def _send(self, request: Request) -> tuple[BaseHTTPResponse, str, str | None]:
        """Send, follow redirects of reads; also gives the last URL and `Authorization`."""
        url = request.url
        for _ in range(_MAX_REDIRECTS + 1):
            headers = {"Accept-Encoding": "identity", **request.headers}
            sent = self._auth.header(request.scope) if _origin(url) == _origin(self.api) else None
            if sent:  # never to another host: it gets a link of its own
                headers["Authorization"] = sent
            response = self._pool(url).urlopen(
                request.method,
                url,
                body=request.body or None,
                headers=headers,
                retries=False,
                redirect=False,
                timeout=self._timeout,
                preload_content=False,
                decode_content=False,
            )
            target = response.get_redirect_location()
            if not target or request.method not in {"GET", "HEAD"}:
                return response, url, sent
            _discard(response)
            url = self._redirected(url, target)
        raise RetryableError(f"{_shown(request.url)} redirects more than {_MAX_REDIRECTS} times")

    def _redirected(self, url: str, target: str) -> str:
        found = urljoin(url, target)
        scheme = urlsplit(found).scheme
        if scheme != "https" and not (scheme == "http" and url.startswith("http:")):
            raise AccessError(f"{_shown(url)} redirects to {_shown(found)}, which is not https")
        return found

    def _fault(self, request: Request, response: BaseHTTPResponse) -> PipelineError:
        """What an unexpected status means."""
        status = response.status
        said = _said(response)
        message = f"cannot {request.doing}: {_shown(request.url)} answered {status}{said}"
        if status in {401, 403}:
            return self._auth.refused(request.doing)
        if status in {408, 429} or status >= 500:
            return RetryableError(message, _retry_after_s(response.headers.get("Retry-After", "")))
        if status == 404:
            return NotFoundError(message)
        if "MANIFEST_BLOB_UNKNOWN" in said:
            # docker-registry 2.8 does not see a blob while another client uploads the same one
            # (tried 2026-11-25); others take a moment to see what was uploaded.
            return RetryableError(message)
        if "DIGEST_INVALID" in said:
            return CorruptError(f"{message}; what arrived is not what was sent, or a file changed")
        if status == 405:
            what = "deleting (storage.delete.enabled of docker-registry)"
            what = what if request.method == "DELETE" else "writing (it may be read-only just now)"
            return AccessError(f"{message}; switch on {what} in the registry's configuration")
        return PipelineError(f"{message}; is this an OCI registry, and does it take artifacts?")

    def _fetch_token(self, url: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        with _connection_errors(Request(method="GET", url=url, scope="", doing="", expect=())):
            response = self._pool(url).urlopen(
                "GET",
                url,
                headers={"Accept-Encoding": "identity", **headers},
                retries=False,
                redirect=False,
                timeout=self._timeout,
                preload_content=False,
            )
            try:
                if response.status == 429 or response.status >= 500:
                    wait = _retry_after_s(response.headers.get("Retry-After", ""))
                    raise RetryableError(f"{_shown(url)} answered {response.status}", wait)
                return response.status, response.read(_MAX_TOKEN_BYTES)
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
            self._pools[key] = (
                urllib3.ProxyManager(proxy, maxsize=_CONNECTIONS)
                if proxy
                else urllib3.PoolManager(maxsize=_CONNECTIONS)
            )
        return self._pools[key]


def retrying(call: Callable[[], _Result]) -> _Result:
    """Call until there is no `RetryableError`, at most `ATTEMPTS` times."""
    for attempt in range(1, ATTEMPTS):
        try:
            return call()
        except RetryableError as error:
            pause(attempt, error)
    return call()


def pause(attempt: int, error: RetryableError) -> None:
    """Wait before another attempt.

    Args:
        attempt: How many failed.
        error: How the last one did.
    """
    wait_s = BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
    if error.retry_after_s is not None:
        wait_s = min(max(error.retry_after_s, wait_s), _MAX_WAIT_S)
    log.info("Attempt %d of %d failed, next in %.1f s: %s", attempt, ATTEMPTS, wait_s, error)
    time.sleep(wait_s)


@contextlib.contextmanager
def _connection_errors(request: Request) -> Iterator[None]:
    """Turn a fault of the connection into a `RetryableError`."""
    try:
        yield
    except SSLError as error:
        raise AccessError(
            f"{_shown(request.url)} has no TLS certificate that this machine trusts ({error}); "
            "set SSL_CERT_FILE, or plain_http for a registry that speaks HTTP"
        ) from error
    except (HTTPError, OSError) as error:
        raise RetryableError(f"the connection to {_shown(request.url)} broke: {error}") from error


def _discard(response: BaseHTTPResponse) -> None:
    """Give the connection back if the body was read, else close it."""
    if response.length_remaining == 0:
        response.drain_conn()
        response.release_conn()
    else:
        response.close()


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _shown(url: str) -> str:
    """A URL for a message: its query may hold a signature."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}"[:300]


def _said(response: BaseHTTPResponse) -> str:
    """What the registry says of an error, made printable; empty if nothing."""
    with contextlib.suppress(HTTPError, OSError, ValueError, TypeError, KeyError, AttributeError):
        body = response.read(_MAX_ERROR_BYTES, decode_content=False)
        texts = [f"{one['code']} {one.get('message', '')}" for one in json.loads(body)["errors"]]
        text = "; ".join(texts)[:300]
        return ": " + "".join(letter if letter.isprintable() else "?" for letter in text)
    return ""


def _retry_after_s(text: str) -> float | None:
    """Seconds of a `Retry-After`, a number or a date; None if it is neither."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
