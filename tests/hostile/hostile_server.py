"""A server that lies, stalls, drips, redirects and pages without end, by a seed.

It is one of the servers in memory that does what it is asked, until its `Malice` answers instead.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.registry.stores.faulty import (
    Fault,
    FaultyHandler,
    FaultyServer,
    Seen,
    answering,
    dripping,
    lose_reply,
    refusing,
    reset,
    spoil,
)
from tests.registry.stores.s3_server import MemoryS3

YEAR_S = "31536000"
OK = b"HTTP/1.1 200 OK\r\n"


def endless(head: bytes, piece: bytes) -> Fault:
    """The same without end, as fast as it goes."""

    def pour(handler: Any) -> None:
        handler.close_connection = True
        with contextlib.suppress(OSError):  # the client went away
            handler.wfile.write(head)
            while not handler.server.closing.is_set():
                handler.wfile.write(piece)

    return answering(pour)


@answering
def silent(handler: Any) -> None:
    """Not a byte."""
    handler.server.closing.wait()
    handler.close_connection = True


CHUNK = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
SLOW: Mapping[str, Fault] = {
    "silent": silent,
    "head": dripping(b"HTTP/1.1 200 OK\r\nX-Long: "),
    "body": dripping(OK + b"Content-Length: 1000000\r\n\r\n"),
    "chunks": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n"),
    "error": dripping(b"HTTP/1.1 503 No\r\nContent-Length: 1000000\r\n\r\n"),
    "stalls": spoil(sent_most=1, stall_s=1e9),
    "headers": endless(OK, b"X-More: 1\r\n"),
    "continue": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "resets": reset,
    "inside": spoil(sent_most=1),
    "busy": refusing(429, "TOOMANYREQUESTS", Retry_After=YEAR_S, x_amz_retry_after=YEAR_S),
    "down": refusing(503, "SlowDown", Retry_After="soon"),
}
"""Whatever is asked, the client learns nothing: these end in `try again`."""


@functools.cache
def _zipped() -> bytes:
    return gzip.compress(bytes(64 << 20))


def _raw(head: bytes, body: Callable[[], bytes]) -> Fault:
    def send(handler: Any) -> None:
        handler.close_connection = True
        data = body()
        with contextlib.suppress(OSError):  # the client went away
            handler.wfile.write(OK + head + b"Content-Length: %d\r\n\r\n" % len(data) + data)

    return answering(send)


GREEDY: Mapping[str, Fault] = {
    "long": endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", CHUNK),
    "zipped": _raw(b"Content-Encoding: gzip\r\n", _zipped),
    "deep": _raw(b"", lambda: b'{"a": [' + b"[]," * 1_300_000 + b"[]]}"),
}
"""What would fill the memory or the disk of a client that reads all of it."""
JUNK = [
    *(b"", b"null", b"[]", b"\xff\xfe", b"{}", b'{"manifests": [{"size": -1}]}', b'{"tags": [3]}'),
    *(b'{"repositories": {"a": 1}}', b"<html><body>Log in</body></html>", b"<a>" * 200_000),
    *(b"{" * 200_000, b"[" * 200_000, b"9" * 100_000, b'{"a": ' + b"[]," * 9 + b"[]}"),
    b"<ListBucketResult><Contents><Key>x</Key><Size>x</Size></Contents></ListBucketResult>",
    b"<ListBucketResult><Contents><LastModified>x</LastModified></Contents></ListBucketResult>",
    b"<ListMultipartUploadsResult><Upload/></ListMultipartUploadsResult>",
    b'<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><a>&b;</a>',
    b'{"errors": [{"code": "\x1b[2J", "message": "\x1b]0;x\x07"}]}',
]
KINDS = ("application/json", "application/xml", "text/html", "application/octet-stream")
LIES = ({"Content_Length": text} for text in ("-1", "x", "0", "1", "9" * 9, "9" * 30, "1, 2", None))
HEADERS: list[Mapping[str, str | None]] = [
    *LIES,
    *({"Content_Encoding": kind} for kind in ("gzip", "br", "\x1b[2J")),
    *({"Content_Range": text} for text in ("bytes 7-7/9", "x", "bytes 0-/")),
    *({"Last_Modified": text, "Date": text} for text in ("x", "Thu, 01 Jan 99999 00:00:00 GMT")),
    *({"x_amz_checksum_crc32": text} for text in ("x", "\xff", "AAAAAA==")),
    *({"Docker_Content_Digest": text} for text in ("x", "sha256:" + "0" * 64)),
    *({"Location": text} for text in ("http://[", "file:///etc/passwd", "", "//", "\x1b[2J")),
    *({"Link": text} for text in ('<http://[>; rel="next"', "<>; rel=next", "<x>; rel=next")),
]
STATUSES = (100, 204, 206, 301, 304, 307, 400, 403, 404, 405, 409, 412, 416, 418, 500, 599)


def lying(choose: random.Random, thief: str) -> Fault:
    """One lie."""
    away = f"{choose.choice(('http://', 'https://', '//'))}{thief}/v2/a/manifests/b?secret=1"
    body, kind = choose.choice(JUNK), choose.choice(KINDS)
    realm = f'{choose.choice(("Bearer", "Basic"))} realm="{away}",service="x",scope="y"'
    status = choose.choice(STATUSES)
    return choose.choice(
        [
            lose_reply,
            answering(lambda handler: handler.answer(200, body, kind)),
            answering(
                lambda handler: handler.answer(200, _zipped(), kind, Content_Encoding="gzip")
            ),
            refusing(status, choose.choice(("", "NoSuchBucket", "DENIED", "\x1b[2J", "<&"))),
            refusing(choose.choice((301, 302, 307, 308)), "PermanentRedirect", Location=away),
            refusing(401, "UNAUTHORIZED", WWW_Authenticate=realm),
            answering(lambda handler: handler.answer(202, Location=away)),
            answering(lambda handler: handler.answer(307, Location=handler.path)),
            answering(lambda handler: handler.answer(301, x_amz_bucket_region=f"{thief}/#")),
            spoil(stated=choose.choice(HEADERS)),
            spoil(sent_most=choose.randrange(300)),
            spoil(ignores_range=True),
            _confuse,
            _page,
            *map(refusing, (404, 403), ("NoSuchKey", "AccessDenied")),
        ]
    )


def _confuse(handler: Any) -> bool:
    """Answer what was asked before."""
    earlier = [one for one in handler.server.seen if one.method == handler.command == "GET"]
    if earlier:
        handler.where = random.Random(len(earlier)).choice(earlier).path.partition("?")[0]
    return False


def _page(handler: Any) -> bool:
    """One more page, and another one after it, with what may be there or with nothing."""
    number = len(handler.server.seen)
    if isinstance(handler.server, MemoryS3):
        item = f"<Contents><Key>registry/a/b/1-{number}/x</Key></Contents>" if number % 2 else ""
        token = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{number}"
        page = f"<ListBucketResult>{item}{token}</NextContinuationToken></ListBucketResult>"
        handler.answer(200, page.encode(), "application/xml")
    else:
        names = f'"x{number}"' if number % 2 else ""
        body = f'{{"tags": [{names}], "repositories": [{names}], "manifests": []}}'
        link = f'<{handler.where}?n={number}>; rel="next"'
        handler.answer(200, body.encode(), "application/json", Link=link)
    return True


page = answering(_page)
"""Whatever is asked, there is more of it."""


@dataclass(kw_only=True)
class Malice:
    """Lets a share of the requests meet a fault, after some that were honest."""

    choose: random.Random
    fault: Fault
    after: int = 0
    share: float = 1.0

    def fault_for(self, seen: Seen) -> Fault | None:
        self.after -= 1
        return self.fault if self.after < 0 and self.choose.random() < self.share else None

    def take(self, server: FaultyServer) -> None:
        """Answer for a server from now on."""
        server.fault_for = self.fault_for  # type: ignore[method-assign]


class Thief(FaultyServer):
    """Another host, which writes down all that comes."""

    def __init__(self) -> None:
        super().__init__(_ThiefHandler)
        self.got = bytearray()


class _ThiefHandler(FaultyHandler):
    def respond(self) -> None:
        with self.server.lock:
            self.server.got += f"{self.requestline}\n{self.headers}\n".encode() + self.body
        self.answer(200, b'{"token": "x", "access_token": "y"}', "application/json")
