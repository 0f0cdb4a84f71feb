"""One deadline and one floor for everything that goes over a network.

The timeout of a socket begins anew with every byte, so a server that sends one now and then would
hold a command for ever. So a body must come at `FLOOR_BYTES_PER_S` on average of each `WINDOW_S`
that we waited for it, and the head of a reply must be there when the request could have been sent
at that pace, plus `SILENCE_S`. A violation is a TransientError.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from pipeline.core.errors import CorruptError, TransientError

FLOOR_BYTES_PER_S = 16 << 10
WINDOW_S = 30.0
CONNECT_S = 10.0
SILENCE_S = 20.0
"""With four attempts, a server that does not answer costs 80 s."""
ATTEMPTS = 4
CHUNK_BYTES = 256 << 10
"""1 GB in pieces of 64 MiB with 8 threads, SHA-256 included, took 1.4 s; with chunks of 512 KiB 1.2
to 2.2 s, with 1 MiB 3.3 s (loopback, 2 cores, medians, measured 2026-11-25; why is not known)."""
_MAX_SKIP_BYTES = 64 << 20
"""What is read and thrown away where a server ignores `Range`."""
CONNECTIONS = 32
"""More than one command opens: the pull client reads 16 pieces at once."""


def at_pace(read: Callable[[int], bytes], what: str) -> Iterator[bytes]:
    """The chunks of a body; a TransientError when they come below `FLOOR_BYTES_PER_S`.

    `read` gives what has arrived, at most so many bytes and empty at the end; it must not wait
    until they are all there. Only the time that we waited counts.
    """
    waited_s, received_bytes = 0.0, 0
    while True:
        began_s = time.monotonic()
        data = read(CHUNK_BYTES)
        waited_s += time.monotonic() - began_s
        received_bytes += len(data)
        if not data:
            return
        if waited_s >= WINDOW_S:
            if received_bytes < waited_s * FLOOR_BYTES_PER_S:
                pace = f"{received_bytes / waited_s / 1024:.1f} KiB/s"
                wanted = f"at least {FLOOR_BYTES_PER_S >> 10} are wanted"
                raise TransientError(f"{what} comes at {pace}, {wanted}; check the network")
            waited_s, received_bytes = 0.0, 0
        yield data


def read_whole(chunks: Iterator[bytes], limit_bytes: int, what: str) -> bytes:
    """A whole small body; CorruptError if it is longer than `limit_bytes`."""
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > limit_bytes:
            raise CorruptError(f"{what} is longer than {limit_bytes} bytes")
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


class Deadline:
    """Mixed into a urllib3 connection: the head of a reply is there in time, or never."""

    sock: socket.socket | None
    _timer: threading.Timer
    _late: bool

    def request(
        self, method: str, url: str, body: Any = None, headers: Any = None, **more: Any
    ) -> None:
        if self.sock is None:
            self.connect()  # type: ignore[attr-defined]  # of the connection that this is mixed into
        self._late = False
        seconds = SILENCE_S + _size_bytes(body, headers or {}) / FLOOR_BYTES_PER_S
        self._timer = threading.Timer(seconds, self._give_up, [self.sock])
        self._timer.daemon = True
        self._timer.start()
        try:
            super().request(method, url, body=body, headers=headers, **more)  # type: ignore[misc]
        except BaseException:
            self._timer.cancel()
            raise

    def getresponse(self) -> Any:
        """Wait for the head of the reply; TimeoutError if late: half a head would pass for one."""
        try:
            response = super().getresponse()  # type: ignore[misc]  # as above
        finally:
            self._timer.cancel()
        if self._late:
            raise TimeoutError("the reply did not come in time")
        return response

    def _give_up(self, sock: socket.socket) -> None:
        self._late = True
        with contextlib.suppress(OSError):  # closed meanwhile
            sock.shutdown(socket.SHUT_RDWR)


def timed_pools(plain: type, secure: type) -> dict[str, Any]:
    """What `urllib3.PoolManager.pool_classes_by_scheme` needs for connections with a deadline."""
    kinds = {"http": (HTTPConnectionPool, plain), "https": (HTTPSConnectionPool, secure)}
    return {
        scheme: type("Pool", (pool,), {"ConnectionCls": type("Timed", (Deadline, connection), {})})
        for scheme, (pool, connection) in kinds.items()
    }


def _size_bytes(body: Any, headers: Mapping[Any, Any]) -> int:
    for key, value in headers.items():
        if str(key).lower() == "content-length":
            return int(value)
    return len(body) if isinstance(body, bytes | bytearray) else 0
