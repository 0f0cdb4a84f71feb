"""A small S3 in memory, over real HTTP, that can be told to fail.

Only what our store asks for, of one bucket, without authentication: what real servers do, and
whether they like our requests, the tests with SeaweedFS tell. This one does what no real server
does when asked: it loses replies, breaks off, stalls, and says 409.

    with running_s3() as server:
        server.fail("PUT", "manifest.json", lose_reply)     # the next matching request only
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"

Fault = Callable[["Handler"], bool]
"""Answers a request itself, or spoils what follows; True if nothing more is to be done."""


@dataclass(kw_only=True)
class Stored:
    data: bytes
    etag: str
    whole: bool = True
    """Its checksum is of the whole object, not of the checksums of its parts."""
    modified_s: float = field(default_factory=time.time)


@dataclass(kw_only=True)
class Upload:
    key: str
    whole: bool
    parts: dict[int, bytes] = field(default_factory=dict)
    begun_s: float = field(default_factory=time.time)


class MemoryS3(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:  # a client that went away is no news
        pass

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, Upload] = {}
        self.requests: list[tuple[str, str]] = []
        """Method, and key with query, of each request."""
        self.headers: list[dict[str, str]] = []
        self.connections = 0
        self.page = 1000
        self.checksums = True
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self._faults: list[tuple[str, str, Fault]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, method: str, path: str, fault: Fault, times: int = 1) -> None:
        """Let the next requests whose key or query holds `path` meet a fault."""
        self._faults += [(method, path, fault)] * times

    def heal(self) -> None:
        """Let no further request fail."""
        with self.lock:
            self._faults.clear()

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for number, (wanted, part, fault) in enumerate(self._faults):
                if wanted == method and part in path:
                    del self._faults[number]
                    return fault
        return None

    def count(self, method: str, path: str) -> int:
        """How many requests there were whose key or query holds `path`."""
        return sum(path in seen for verb, seen in self.requests if verb == method)


class Handler(BaseHTTPRequestHandler):
    server: MemoryS3
    protocol_version = "HTTP/1.1"
    lost = False  # do everything, but send no reply
    sent_most: int | None = None  # break off after so many bytes of a body
    stall_s = 0.0
    ignores_range = False
    ignores_checks = False

    def setup(self) -> None:
        super().setup()
        self.spoilt: set[str] = set()
        self.server.connections += 1

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_PUT = do_HEAD = do_POST = do_DELETE = do_GET  # noqa: N815

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        size_bytes = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(size_bytes)
        if len(self.body) < size_bytes:  # the client has died
            self.close_connection = True
            return
        self.query = {
            key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()
        }
        bucket, _, self.key = unquote(parts.path).lstrip("/").partition("/")
        what = f"{self.key}?{parts.query}"
        with self.server.lock:
            self.server.requests.append((self.command, what))
            self.server.headers.append(dict(self.headers.items()))
        while self.spoilt:  # of the last request on this connection
            delattr(self, self.spoilt.pop())
        fault = self.server.fault_for(self.command, what)
        if fault is not None and fault(self):
            return
        if bucket != BUCKET:
            self.refuse(404, "NoSuchBucket")
            return
        with self.server.lock:
            answer = self._answer()
        answer()

    def _answer(self) -> Callable[[], None]:
        match self.command:
            case "GET" if not self.key and "uploads" in self.query:
                return self._list_uploads()
            case "GET" if not self.key:
                return self._list()
            case "GET" | "HEAD":
                return self._get()
            case "DELETE" if "uploadId" in self.query:
                gone = self.server.uploads.pop(self.query["uploadId"], None)
                return self._refusal(404, "NoSuchUpload") if gone is None else self._reply(204)
            case "DELETE":
                self.server.objects.pop(self.key, None)
                return self._reply(204)
            case "POST" if "uploads" in self.query:
                name = f"upload-{len(self.server.requests)}"
                self.server.uploads[name] = Upload(
                    key=self.key,
                    whole=self.headers.get("x-amz-checksum-type") == "FULL_OBJECT",
                )
                return self._xml("InitiateMultipartUploadResult", f"<UploadId>{name}</UploadId>")
            case "POST":
                return self._complete()
            case _ if "uploadId" in self.query:
                return self._put_part()
        return self._put()

    def _put(self) -> Callable[[], None]:
        exclusive = self.headers.get("If-None-Match") == "*" and not self.ignores_checks
        if exclusive and self.key in self.server.objects:
            return self._refusal(412, "PreconditionFailed")
        stored = Stored(data=self.body, etag=_etag(self.body))
        self.server.objects[self.key] = stored
        return self._reply(200, {"ETag": stored.etag})

    def _put_part(self) -> Callable[[], None]:
        upload = self.server.uploads.get(self.query["uploadId"])
        if upload is None:
            return self._refusal(404, "NoSuchUpload")
        upload.parts[int(self.query["partNumber"])] = self.body
        return self._reply(200, {"ETag": _etag(self.body)})

    def _complete(self) -> Callable[[], None]:
        upload = self.server.uploads.get(self.query["uploadId"])
        if upload is None:
            return self._refusal(404, "NoSuchUpload")
        numbers = [int(text) for text in re.findall(r"<PartNumber>(\d+)<", self.body.decode())]
        etags = re.findall(r"<ETag>(?:&quot;|\")?(\w+)", self.body.decode())
        data = b""
        for number, etag in zip(numbers, etags, strict=True):
            if etag not in _etag(upload.parts.get(number, b"missing")):
                return self._refusal(400, "InvalidPart")
            data += upload.parts[number]
        del self.server.uploads[self.query["uploadId"]]
        etag = f'{_etag(data)[:-1]}-{len(numbers)}"'
        self.server.objects[self.key] = Stored(data=data, etag=etag, whole=upload.whole)
        return self._xml("CompleteMultipartUploadResult", f"<ETag>{escape(etag)}</ETag>")

    def _get(self) -> Callable[[], None]:
        stored = self.server.objects.get(self.key)
        if stored is None:
            return self._refusal(404, "NoSuchKey")
        headers = {
            "ETag": stored.etag,
            "Last-Modified": self.date_time_string(int(stored.modified_s)),
        }
        if self.headers.get("x-amz-checksum-mode") == "ENABLED" and self.server.checksums:
            crc = base64.b64encode(zlib.crc32(stored.data).to_bytes(4, "big")).decode()
            headers["x-amz-checksum-crc32"] = crc if stored.whole else f"{crc}-2"
            headers["x-amz-checksum-type"] = "FULL_OBJECT" if stored.whole else "COMPOSITE"
        data, status = stored.data, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and not self.ignores_range:
            start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            if start >= len(data):
                return self._refusal(416, "InvalidRange")
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        return self._reply(status, headers, data)

    def _list(self) -> Callable[[], None]:
        prefix, after = self.query.get("prefix", ""), self.query.get("continuation-token", "")
        objects = self.server.objects
        keys = [key for key in sorted(objects) if key.startswith(prefix) and key > after]
        more = len(keys) > self.server.page
        keys = keys[: min(self.server.page, int(self.query.get("max-keys", 1000)))]
        entries = [self._entry(key) for key in keys]
        if more:
            entries.append(f"<NextContinuationToken>{escape(keys[-1])}</NextContinuationToken>")
        entries.append(f"<IsTruncated>{str(more).lower()}</IsTruncated>")
        return self._xml("ListBucketResult", "".join(entries))

    def _entry(self, key: str) -> str:
        stored = self.server.objects[key]
        return (
            f"<Contents><Key>{escape(key)}</Key><Size>{len(stored.data)}</Size>"
            f"<ETag>{escape(stored.etag)}</ETag>"
            f"<LastModified>{_iso(stored.modified_s)}</LastModified></Contents>"
        )

    def _list_uploads(self) -> Callable[[], None]:
        entries = [
            f"<Upload><Key>{escape(upload.key)}</Key><UploadId>{name}</UploadId>"
            f"<Initiated>{_iso(upload.begun_s)}</Initiated></Upload>"
            for name, upload in self.server.uploads.items()
            if upload.key.startswith(self.query.get("prefix", ""))
        ]
        return self._xml("ListMultipartUploadsResult", "".join(entries))

    def refuse(self, status: int, code: str) -> None:
        """Answer with an error, as S3 words it."""
        self._refusal(status, code)()

    def _refusal(self, status: int, code: str) -> Callable[[], None]:
        body = f"<Error><Code>{code}</Code><Message>as the test asked</Message></Error>"
        return self._reply(status, {}, body.encode())

    def _xml(self, root: str, inner: str) -> Callable[[], None]:
        return self._reply(200, {}, f"<{root}>{inner}</{root}>".encode())

    def _reply(
        self, status: int, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> Callable[[], None]:
        def send() -> None:
            if self.lost:
                self.reset()
                return
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(body[: self.sent_most])
            if self.sent_most is not None and self.sent_most < len(body):
                self.wfile.flush()
                self.server.closing.wait(self.stall_s)
                self.reset()

        return send

    def reset(self) -> None:
        """Break the connection off, with an RST."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True


@contextlib.contextmanager
def running_s3() -> Iterator[MemoryS3]:
    """A server on a free port of the loopback address."""
    server = MemoryS3()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def answer(status: int, code: str) -> Fault:
    """Refuse, as S3 does."""

    def fault(handler: Handler) -> bool:
        handler.refuse(status, code)
        return True

    return fault


def lose_reply(handler: Handler) -> bool:
    """Do what was asked, and break off instead of telling."""
    handler.lost = True
    return False


def reset(handler: Handler) -> bool:
    """Break off before anything was done."""
    handler.reset()
    return True


def spoil(**settings: object) -> Fault:
    """Set attributes of the handler for this request, then go on."""

    def fault(handler: Handler) -> bool:
        for name, value in settings.items():
            setattr(handler, name, value)
            handler.spoilt.add(name)
        return False

    return fault


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _iso(time_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s))
