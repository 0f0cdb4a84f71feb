"""One deadline and one floor for everything that goes over a network.

The timeout of a socket begins anew with every byte, so a server that sends one now and then would
hold a command for ever. So a body must come at the floor's pace but for `WINDOW_S`, each piece of a
request must be taken at that pace but for `SILENCE_S`, and then the head of a reply be there within
`SILENCE_S`. All this spends the store's `Patience`. A violation is a TransientError.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from pipeline.core.errors import CorruptError, TransientError
from pipeline.core.patience import FACTOR, FLOOR_BYTES_PER_S, REPLY_S, Patience

WINDOW_S = 30.0 * FACTOR
CONNECT_S = 10.0 * FACTOR
SILENCE_S = 20.0 * FACTOR
ATTEMPTS = 4
CHUNK_BYTES = 512 << 10
"""A pull of 1 GB took 1.32 s from S3 and 1.15 s from OCI; with 256 KiB 1.41 and 1.23 s (loopback, 2
cores, medians of 6 and 5, measured 2026-11-30)."""
MAX_REPLY_BYTES = 2 << 20  # of S3 but for objects; 1,000 of the longest keys have 1.5 MB
MAX_LISTED = 200_000  # names, of some 500 bytes each in memory: 13,000 packages on S3
_FEW_PAGES, _LEAST_PER_PAGE = 20, 100  # less, on average, is a list that never ends
_DOCUMENT_BYTES, _MAX_VALUES = 4 << 20, 100_000  # an empty list of 2 bytes takes 60 in memory
_MAX_SKIP_BYTES = 64 << 20
"""What is read and thrown away where a server ignores `Range`."""
CONNECTIONS = 32
"""More than one command opens: the pull client reads 16 pieces at once."""

_Page = TypeVar("_Page")
_Item = TypeVar("_Item")


def at_pace(read: Callable[[int], bytes], what: str, patience: Patience) -> Iterator[bytes]:
    """The chunks of a body; a TransientError when they come below the floor.

    `read` gives what has arrived, at most so many bytes and empty at the end; it must not wait
    until they are all there. Only the time that we waited counts.
    """
    own = Patience(WINDOW_S)
    while True:
        with patience.waiting(), own.waiting():
            data = read(CHUNK_BYTES)
        if not data:
            return
        for one in (own, patience):
            one.require(what, len(data))
        yield data


def listed(
    pages: Iterable[_Page],
    items: Callable[[_Page], Iterable[_Item] | None],
    what: str,
    count: Iterator[int] | None = None,
) -> Iterator[_Item]:
    """The items of a list in pages; lists that share a `count` are bounded together."""
    count, number = count or itertools.count(1), 0
    for earlier, page in enumerate(pages):
        if earlier > _FEW_PAGES + number / _LEAST_PER_PAGE:
            raise TransientError(f"{what} lists page after page with next to nothing in it")
        for item in items(page) or ():
            number += 1
            if next(count) > MAX_LISTED:
                raise TransientError(f"{what} lists more than {MAX_LISTED} names; make it smaller")
            yield item


def read_whole(chunks: Iterator[bytes], limit_bytes: int, what: str) -> bytes:
    """A whole small body; CorruptError if it is too long, or a document of too many values."""
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > limit_bytes:
            raise CorruptError(f"{what} is longer than {limit_bytes} bytes")
    if limit_bytes <= _DOCUMENT_BYTES and sum(map(data.count, (b"[", b"{", b","))) > _MAX_VALUES:
        raise CorruptError(f"{what} has more than {_MAX_VALUES} values")
    return bytes(data)


def window(chunks: Iterator[bytes], skip: int, size_bytes: int, what: str) -> Iterator[bytes]:
    """What is left without the first `skip` bytes, and at most `size_bytes` of that.

    A server that ignores `Range` sends what precedes; TransientError if that is too much.
    """
    if skip > _MAX_SKIP_BYTES:
        advice = "read the file from its start, or ask who runs its cache or proxy"
        raise TransientError(f"{what}: the server ignores Range; {advice}")
    for chunk in chunks:
        data = chunk[skip:]
        skip = max(skip - len(chunk), 0)
        if data:
            yield data[:size_bytes]
        size_bytes -= min(size_bytes, len(data))
        if not size_bytes:
            return


class _Until(list[Any]):
    """Options of a socket; none is made after `ends_s`: a host may have many addresses."""

    ends_s: float

    def __iter__(self) -> Iterator[Any]:
        if time.monotonic() > self.ends_s:
            raise TimeoutError("no address answered in time")
        return super().__iter__()


class _Alarm:
    """Calls what it was last given when that is due; to be put off costs it no new thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due_s, self._waiting = math.inf, False
        self._ring: Callable[[], None] = self.cancel

    def set(self, seconds: float, ring: Callable[[], None]) -> None:
        with self._changed:
            due_s = time.monotonic() + seconds
            sooner, self._due_s, self._ring = due_s < self._due_s, due_s, ring
            if not self._waiting:
                self._waiting = True
                threading.Thread(target=self._wait, daemon=True).start()
            elif sooner:
                self._changed.notify()

    def cancel(self) -> None:
        with self._changed:
            self._due_s = math.inf
            self._changed.notify()

    def _wait(self) -> None:
        with self._changed:
            while 0 < (left_s := self._due_s - time.monotonic()) < math.inf:
                self._changed.wait(left_s)
            self._waiting = False
            if left_s <= 0:
                self._due_s = math.inf
                self._ring()


class Deadline:
    """Mixed into a urllib3 connection: a request goes out and a reply begins in time, or never."""

    patience: Patience
    host: str
    sock: socket.socket | None
    socket_options: Any
    _alarm: _Alarm
    _silence_s: float
    _taken_s: float  # when all that was sent must be taken, by `time.monotonic`
    _late: bool

    def connect(self) -> None:
        options = self.socket_options = _Until(self.socket_options or ())
        options.ends_s = time.monotonic() + min(SILENCE_S, self.patience.require(self.host))
        super().connect()  # type: ignore[misc]  # of what this is mixed into

    def request(
        self, method: str, url: str, body: Any = None, headers: Any = None, **more: Any
    ) -> None:
        self._late, self._alarm, began_s = False, _Alarm(), time.monotonic()
        self._silence_s = min(SILENCE_S, self.patience.require(self.host))
        self._taken_s = began_s + self._silence_s
        self.blocksize = CHUNK_BYTES  # of a file that is sent
        self._start_timer(self._silence_s)
        try:
            if self.sock is None:
                self.connect()
            # The timer bounds it: a socket's own timeout is for all that one call sends.
            self.sock.settimeout(None)  # type: ignore[union-attr]
            super().request(method, url, body=body, headers=headers, **more)  # type: ignore[misc]
        except BaseException:
            self._alarm.cancel()
            raise
        self._start_timer(self._silence_s)
        # What goes out at pace costs no patience.
        at_pace_s = self._taken_s - self._silence_s - began_s
        self.patience.left_s(earned_s=min(at_pace_s, time.monotonic() - began_s))

    def send(self, data: bytes) -> None:
        for start in range(0, len(data), CHUNK_BYTES):
            piece = data[start : start + CHUNK_BYTES]
            takes_s = len(piece) / FLOOR_BYTES_PER_S
            self._taken_s += takes_s
            left_s = self._taken_s - time.monotonic()
            self._start_timer(max(0.0, min(left_s, takes_s + self._silence_s)))
            super().send(piece)  # type: ignore[misc]

    def getresponse(self) -> Any:
        """Wait for the head of the reply; TimeoutError if late: half a head would pass for one."""
        sock = self.sock  # forgotten where the reply is the last one
        try:
            response = super().getresponse()  # type: ignore[misc]  # as above
        finally:
            self._alarm.cancel()
        if self._late:
            raise TimeoutError("the reply did not come in time")
        self.patience.left_s(earned_s=REPLY_S)

        def read1(*arguments: Any, **named: Any) -> bytes:
            self._start_timer(SILENCE_S, sock)
            try:
                return plain(*arguments, **named)
            finally:
                self._alarm.cancel()

        plain: Callable[..., bytes] = response.read1
        if response.chunked:  # the line before a chunk may drip inside one read
            response.read1 = read1

        def stream(*_: object, **__: object) -> Iterator[bytes]:
            chunks = at_pace(response.read1, self.host, self.patience)
            yield read_whole(chunks, MAX_REPLY_BYTES, f"a reply of {self.host}")

        # How botocore reads every reply but an object, and urllib3 what it does not want.
        response.stream, response.drain_conn = stream, response.close
        return response

    def _start_timer(self, seconds: float, sock: socket.socket | None = None) -> None:
        def give_up() -> None:
            self._late = True
            with contextlib.suppress(OSError, AttributeError):  # closed, or not yet open
                (sock or self.sock).shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

        self._alarm.set(seconds, give_up)


def timed_pools(plain: type, secure: type, patience: Patience) -> dict[str, Any]:
    """What `urllib3.PoolManager.pool_classes_by_scheme` needs for connections with a deadline."""
    kinds = {"http": (HTTPConnectionPool, plain), "https": (HTTPSConnectionPool, secure)}
    pools = {}
    for scheme, (pool, connection) in kinds.items():
        timed = type("Timed", (Deadline, connection), {"patience": patience})
        pools[scheme] = type("Pool", (pool,), {"ConnectionCls": timed})
    return pools
