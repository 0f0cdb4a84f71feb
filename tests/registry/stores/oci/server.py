"""A small OCI registry over real HTTP, with what docker-registry lacks, and with faults on demand.

It keeps everything in memory. It has the referrers API (unless `native` is off), Bearer or Basic
authorization, blobs on another host, and `faults`: functions that may answer in its place.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pipeline.registry.stores.oci.registry import OciRegistry
from pipeline.registry.stores.publication import WritableStore

USER, PASSWORD = "builder", "s3cret"
Fault = Callable[["Handler"], bool]
"""Answers a request and says so, or leaves it alone."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A request that came."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass(kw_only=True)
class FakeRegistry:
    """The state of one server; see the module."""

    host: str = ""
    native: bool = True  # has the referrers API
    auth: str = ""  # "", "bearer" or "basic"
    page: int = 1000  # longest list in one reply
    ranges: bool = True
    blobs_at: str = ""  # another host that has the blobs
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, bytearray] = field(default_factory=dict)
    manifests: dict[tuple[str, str], tuple[str, bytes]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)

    def store(self, prefix: str = "engines", **more: Any) -> WritableStore:
        return OciRegistry(url=f"oci://{self.host}/{prefix}", **more).store()

    def referrers(self, repository: str, subject: str) -> list[dict[str, Any]]:
        found = []
        for (where, reference), (kind, data) in self.manifests.items():
            value = json.loads(data)
            about = (value.get("subject") or {}).get("digest")
            if where == repository and reference.startswith("sha256:") and about == subject:
                found.append({"mediaType": kind, "digest": reference, "size": len(data)})
                found[-1]["artifactType"] = value.get("artifactType", "")
                found[-1]["annotations"] = value.get("annotations", {})
        return found


@contextlib.contextmanager
def fake_registry(**settings: Any) -> Iterator[FakeRegistry]:
    """Run one on a free loopback port."""
    registry = FakeRegistry(**settings)
    handler = type("BoundHandler", (Handler,), {"registry": registry})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    registry.host = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every reply waits 40 ms for an acknowledgement
    registry: FakeRegistry
    failing = False

    def log_message(self, *_: Any) -> None:
        pass

    def answer(
        self, status: int, body: bytes = b"", kind: str = "application/json", **headers: str
    ) -> None:
        self.send_response(status)
        if self.failing:  # else the next request might meet a connection that is going
            self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", kind)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):  # a client that has read enough goes away
                self.wfile.write(body)

    def error(self, status: int, code: str, **headers: str) -> None:
        body = json.dumps({"errors": [{"code": code, "message": "as the test wants"}]}).encode()
        self.answer(status, body, **headers)

    def reset(self) -> None:
        """Break the connection off."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def handle_any(self) -> None:
        seen = Seen(method=self.command, path=self.path, headers=dict(self.headers))
        self.registry.seen.append(seen)
        self.failing = True
        if any(fault(self) for fault in list(self.registry.faults)):
            self.close_connection = True  # a body may be unread
            return
        self.failing = False
        size_bytes = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(size_bytes)
        if len(self.body) < size_bytes:  # the client has died
            self.close_connection = True
            return
        parts = urlsplit(self.path)
        if parts.path == "/token":
            self._token(parse_qs(parts.query))
        elif self._allowed():
            self._api(parts.path, parse_qs(parts.query))

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = handle_any  # noqa: N815

    def _allowed(self) -> bool:
        sent = self.headers.get("Authorization", "")
        if not self.registry.auth:
            return True
        if self.registry.auth == "basic":
            if sent == basic():
                return True
            self.error(401, "UNAUTHORIZED", WWW_Authenticate='Basic realm="x"')
            return False
        if sent.removeprefix("Bearer ") in self.registry.tokens:
            return True
        repository = re.sub(r"^/v2/(.*)/(manifests|blobs|tags|referrers)/.*$", r"\1", self.path)
        action = "pull" if self.command in {"GET", "HEAD"} else "pull,push"
        challenge = (
            f'Bearer realm="http://{self.registry.host}/token",service="fake",'
            f'scope="repository:{repository}:{action}"'
        )
        self.error(401, "UNAUTHORIZED", WWW_Authenticate=challenge)
        return False

    def _token(self, query: Mapping[str, list[str]]) -> None:
        if self.headers.get("Authorization") != basic():
            self.error(401, "UNAUTHORIZED")
            return
        token = f"token-{len(self.registry.tokens)}-{query['scope'][0]}"
        self.registry.tokens.add(token)
        value = {"token": token}
        self.answer(200, json.dumps(value).encode())

    def _api(self, path: str, query: Mapping[str, list[str]]) -> None:
        match = re.fullmatch(r"/v2/(?:(.+)/)?(manifests|blobs|tags|referrers|_catalog)/?(.*)", path)
        if match is None:
            self.error(404, "NOT_FOUND")
            return
        repository, kind, rest = match[1] or "", match[2], match[3]
        if kind == "manifests":
            self._manifest(repository, rest)
        elif kind == "blobs" and rest.startswith("uploads/"):
            self._upload(repository, rest.removeprefix("uploads/"), query)
        elif kind == "blobs":
            self._blob(rest)
        elif kind == "referrers" and not self.registry.native:
            self.error(404, "NOT_FOUND")
        elif kind == "referrers":
            items = self.registry.referrers(repository, rest)
            self._page(items, "manifests", "application/vnd.oci.image.index.v1+json")
        elif kind == "_catalog":
            self._page(sorted({where for where, _ in self.registry.manifests}), "repositories")
        else:
            tags = [t for where, t in self.registry.manifests if where == repository]
            self._page([tag for tag in tags if not tag.startswith("sha256:")], "tags")

    def _page(self, items: list[Any], key: str, kind: str = "application/json") -> None:
        parts = urlsplit(self.path)
        start = int(parse_qs(parts.query).get("from", ["0"])[0])
        end = start + self.registry.page
        link: dict[str, str] = (
            {"Link": f'<{parts.path}?from={end}>; rel="next"'} if end < len(items) else {}
        )
        self.answer(200, json.dumps({key: items[start:end]}).encode(), kind, **link)

    def _manifest(self, repository: str, reference: str) -> None:
        manifests = self.registry.manifests
        if self.command == "PUT":
            digest = f"sha256:{hashlib.sha256(self.body).hexdigest()}"
            entry = (self.headers["Content-Type"], self.body)
            manifests[repository, reference] = manifests[repository, digest] = entry
            subject = (json.loads(self.body).get("subject") or {}).get("digest")
            extra = {"OCI_Subject": subject} if subject and self.registry.native else {}
            self.answer(201, b"", "text/plain", Docker_Content_Digest=digest, **extra)
        elif (repository, reference) not in manifests:
            self.error(404, "MANIFEST_UNKNOWN")
        elif self.command == "DELETE":
            gone = manifests[repository, reference]
            for key in [key for key, entry in manifests.items() if entry == gone]:
                del manifests[key]
            self.answer(202)
        else:
            kind, data = manifests[repository, reference]
            self.answer(200, data, kind)

    def _upload(self, repository: str, name: str, query: Mapping[str, list[str]]) -> None:
        uploads = self.registry.uploads
        if self.command == "POST":
            name = str(len(self.registry.seen))
            uploads[name] = bytearray()
            self.answer(202, Location=f"/v2/{repository}/blobs/uploads/{name}?state=1")
            return
        if name not in uploads:
            self.error(404, "BLOB_UPLOAD_UNKNOWN")
            return
        where = {"Location": f"/v2/{repository}/blobs/uploads/{name}?state=1"}
        if self.command == "DELETE":
            del uploads[name]
            self.answer(204)
            return
        if self.command == "PATCH":
            start = int(self.headers["Content-Range"].partition("-")[0])
            if start != len(uploads[name]):
                self.error(416, "BLOB_UPLOAD_INVALID")
                return
        uploads[name] += self.body
        if self.command == "PUT":
            digest, data = query["digest"][0], bytes(uploads.pop(name))
            if digest != f"sha256:{hashlib.sha256(data).hexdigest()}":
                self.error(400, "DIGEST_INVALID")
                return
            self.registry.blobs[digest] = data
            self.answer(201)
            return
        status = 202 if self.command == "PATCH" else 204
        where["Range"] = f"0-{max(len(uploads[name]) - 1, 0)}"
        self.answer(status, b"", "text/plain", **where)

    def _blob(self, digest: str) -> None:
        if digest not in self.registry.blobs:
            self.error(404, "BLOB_UNKNOWN")
            return
        if self.registry.blobs_at and self.command == "GET":
            where = f"http://{self.registry.blobs_at}{self.path}?signature=hidden"
            self.answer(307, Location=where)
            return
        data = self.registry.blobs[digest]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None or not self.registry.ranges:
            self.answer(200, data, "application/octet-stream")
            return
        start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
        if start >= len(data):
            self.error(416, "RANGE")
            return
        extent = f"bytes {start}-{end - 1}/{len(data)}"
        self.answer(206, data[start:end], "application/octet-stream", Content_Range=extent)


def basic() -> str:
    """What the right user sends."""
    return "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


def once(*methods: str, part: str, act: Callable[[Handler], None], times: int = 1) -> Fault:
    """A fault of the first requests whose path has `part`."""
    left = [times]

    def fault(handler: Handler) -> bool:
        if handler.command not in methods or part not in handler.path or not left[0]:
            return False
        left[0] -= 1
        act(handler)
        return True

    return fault
