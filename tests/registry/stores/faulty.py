"""Servers in memory, over real HTTP, that do what no real server does when asked.

What real servers do, and whether they like our requests, the tests with services tell. These lose
replies, break off, stall and lie:

    server.fail("PUT", "manifest.json", lose_reply)     # the next matching request only
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

Fault = Callable[[Any], bool]
"""Answers a request itself, given its handler, or spoils what follows; True if all is done."""
_Server = TypeVar("_Server", bound="FaultyServer")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A request that came; `path` with its query."""

    method: str
    path: str
    headers: Mapping[str, str]


class FaultyServer(ThreadingHTTPServer):
    """The state of one server.

    Attributes:
        seen: All requests.
        connections: How many there were.
        closing: Set when it ends.
        page: Longest list in one reply.
    """

    daemon_threads = True

    def __init__(self, handler: type[FaultyHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.host = f"127.0.0.1:{self.server_port}"
        self.seen: list[Seen] = []
        self.connections = 0
        self.closing = threading.Event()
        self.lock = threading.RLock()
        self.page = 1000
        self._faults: list[tuple[str, str, Fault]] = []

    def handle_error(self, *args: object) -> None:  # a client that went away is no news
        pass

    def fail(self, method: str, part: str, fault: Fault, times: int = 1) -> None:
        """Let the next requests whose path or query holds `part` meet a fault."""
        self._faults += [(method, part, fault)] * times

    def heal(self) -> None:
        """Let no further request fail."""
        with self.lock:
            self._faults.clear()

    def unmet(self) -> list[tuple[str, str]]:
        """Method and part of the faults that no request has met."""
        return [(method, part) for method, part, _ in self._faults]

    def fault_for(self, seen: Seen) -> Fault | None:
        for number, (method, part, fault) in enumerate(self._faults):
            if method == seen.method and part in seen.path:
                del self._faults[number]
                return fault
        return None

    def count(self, method: str, part: str) -> int:
        """How many requests there were whose path or query holds `part`."""
        return sum(part in one.path for one in self.seen if one.method == method)


@contextlib.contextmanager
def running(server: _Server) -> Iterator[_Server]:
    """Answer in a thread until the block ends."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class FaultyHandler(BaseHTTPRequestHandler):
    """One connection; `spoil` sets what the class has as attributes, for one request."""

    server: Any
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every reply waits 40 ms for an acknowledgement
    lost = False  # do everything, but send no reply
    sent_most: int | None = None  # break off after so many bytes of a body
    stall_s = 0.0
    stated: Mapping[str, str | None] = {}  # headers, whatever is true; None: not stated
    ignores_range = False
    ignores_checks = False

    def setup(self) -> None:
        super().setup()
        self.spoilt: set[str] = set()
        self.server.connections += 1

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        size_bytes = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(size_bytes)
        if len(self.body) < size_bytes:  # the client has died
            self.close_connection = True
            return
        parts = urlsplit(self.path)
        self.where = unquote(parts.path)
        self.query = {
            key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()
        }
        while self.spoilt:  # of the last request on this connection
            delattr(self, self.spoilt.pop())
        path = unquote(self.path)
        seen = Seen(method=self.command, path=path, headers=dict(self.headers.items()))
        with self.server.lock:
            self.server.seen.append(seen)
            fault = self.server.fault_for(seen)
        if fault is None or not fault(self):
            self.respond()

    do_PUT = do_HEAD = do_POST = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def respond(self) -> None:
        """Do what is asked."""
        raise NotImplementedError

    def refuse(self, status: int, code: str, **headers: str) -> None:
        """Answer with an error, as servers of this kind word it."""
        raise NotImplementedError

    def answer(
        self, status: int, body: bytes = b"", kind: str = "application/octet-stream", **headers: str
    ) -> None:
        if self.lost:
            self.reset()
            return
        self.send_response(status)
        for name, value in {
            "Content_Type": kind,
            "Content_Length": str(len(body)),
            **headers,
            **self.stated,
        }.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(OSError):  # a client that has read enough goes away
            self.wfile.write(body[: self.sent_most])
        if self.sent_most is not None and self.sent_most < len(body):
            self.wfile.flush()
            self.server.closing.wait(self.stall_s)
            self.reset()

    def answer_range(self, data: bytes, **headers: str) -> None:
        """The part of the data that `Range` asks for."""
        start, _, end = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not start or self.ignores_range:
            self.answer(200, data, **headers)
        elif int(start) >= len(data):
            self.refuse(416, "InvalidRange")
        else:
            last = min(int(end or len(data)), len(data) - 1)
            extent = f"bytes {start}-{last}/{len(data)}"
            self.answer(206, data[int(start) : last + 1], Content_Range=extent, **headers)

    def reset(self) -> None:
        """Break the connection off, with an RST."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True


def answering(act: Callable[[Any], object]) -> Fault:
    """Let `act` answer."""

    def fault(handler: FaultyHandler) -> bool:
        act(handler)
        return True

    return fault


def refusing(status: int, code: str, **headers: str) -> Fault:
    """Refuse, as servers of this kind do."""
    return answering(lambda handler: handler.refuse(status, code, **headers))


reset = answering(lambda handler: handler.reset())
"""Break off before anything was done."""


def lose_reply(handler: FaultyHandler) -> bool:
    """Do what was asked, and break off instead of telling."""
    return spoil(lost=True)(handler)


def spoil(**settings: object) -> Fault:
    """Set attributes of the handler for this request, then go on."""

    def fault(handler: FaultyHandler) -> bool:
        for name, value in settings.items():
            setattr(handler, name, value)
            handler.spoilt.add(name)
        return False

    return fault


def dripping(head: bytes) -> Fault:
    """A byte now and then after this head, without end."""

    def drip(handler: FaultyHandler) -> None:
        handler.close_connection = True
        with contextlib.suppress(OSError):  # the client went away
            handler.wfile.write(head)
            while not handler.server.closing.wait(0.05):
                handler.wfile.write(b"x")
                handler.wfile.flush()

    return answering(drip)


def stall(seconds: float) -> Fault:
    """Say nothing for a while, then break off."""

    def wait(handler: FaultyHandler) -> None:
        time.sleep(seconds)
        handler.reset()

    return answering(wait)
