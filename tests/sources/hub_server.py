"""A Hub of one tiny repository on loopback, with a CDN on another host, and faults on demand.

It speaks what `huggingface_hub` 1.33 and the Hub say to each other: `/api/models/.../revision/...`
(or `/api/datasets/...`) with blobs, `/resolve/` with a relative redirect for files in git and one
to the CDN for LFS files, their headers, and `Range`. `test_hub_source.py` and `test_hub_dataset.py`
let the library itself download from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pipeline.sources.hub import HubSource
from tests.sources.tiny_model import tiny_repository

REPO = "acme/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_test"


@dataclass(frozen=True)
class Request:
    """One request as it arrived."""

    method: str
    path: str
    headers: Message


@dataclass
class HubServer:
    """The repository and its faults; start it with `with`.

    Attributes:
        files: Content by path.
        sent: Path -> bytes that are sent in place of the true ones.
        always: Answers every request to the Hub.
        kind: What the repository holds.
        tags: What it is tagged with, such as its licence.
        gated: Files need `TOKEN`; a token that is not `TOKEN` has no access.
        requests: All that was asked.
    """

    files: dict[str, bytes] = field(default_factory=tiny_repository)
    sent: dict[str, bytes] = field(default_factory=dict)
    always: int | None = None
    kind: Literal["model", "dataset"] = "model"
    tags: tuple[str, ...] = ()
    gated: bool = False
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._hub = _serve("127.0.0.1", _hub_handler(self))
        self._cdn = _serve("127.0.0.2", _cdn_handler(self))  # another host, as in life
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._hub.server_port}"

    def cdn_requests(self, name: str) -> list[Request]:
        """Requests for the content of an LFS file."""
        return [request for request in self.requests if request.path == f"/cdn/{name}"]

    def is_lfs(self, name: str) -> bool:
        return name.endswith((".safetensors", ".bin", ".pth", ".parquet"))

    def listing(self) -> dict[str, Any]:
        """Answer of the API, shaped as the Hub's."""
        siblings = []
        for name, content in self.files.items():
            entry: dict[str, Any] = {
                "rfilename": name,
                "size": len(content),
                "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
            }
            if self.is_lfs(name):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {
            "_id": "1", "id": REPO, "modelId": REPO, "sha": COMMIT, "private": False,
            "gated": "manual" if self.gated else False, "disabled": False, "tags": list(self.tags),
            "downloads": 0, "likes": 0, "siblings": siblings,
        }  # fmt: skip


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news."""


def _serve(host: str, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    server = _QuietServer((host, 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD through `answer`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def reply(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _hub_handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    """The Hub itself."""

    class Handler(_Handler):
        def answer(self) -> None:
            hub.requests.append(Request(self.command, self.path, self.headers))
            if hub.always is not None:
                return self.reply(hub.always, b"{}")
            path = urlsplit(self.path).path
            folder = "datasets/" if hub.kind == "dataset" else ""
            api, resolve = f"/api/{hub.kind}s/{REPO}/revision/", f"/{folder}{REPO}/resolve/"
            in_git = f"/api/resolve-cache/{hub.kind}s/{REPO}/{COMMIT}/"
            if path.startswith(in_git):
                return self.content(path.removeprefix(in_git))
            if not path.startswith((api, resolve)):
                return self.reply(404, X_Error_Code="RepoNotFound")
            if path.startswith(api):
                if path not in {api + COMMIT, api + "main"}:
                    return self.reply(404, X_Error_Code="RevisionNotFound")
                return self.reply(200, json.dumps(hub.listing()).encode())
            token = self.headers.get("Authorization")
            if hub.gated and token != f"Bearer {TOKEN}":
                return self.reply(403 if token else 401, X_Error_Code="GatedRepo")
            name = path.removeprefix(f"{resolve}{COMMIT}/")
            if name not in hub.files:
                return self.reply(404, X_Error_Code="EntryNotFound")
            content = hub.files[name]
            if not hub.is_lfs(name):
                return self.reply(307, Location=in_git + name, X_Repo_Commit=COMMIT)
            digest = hashlib.sha256(content).hexdigest()
            return self.reply(
                302,
                Location=f"http://127.0.0.2:{hub._cdn.server_port}/cdn/{name}",
                X_Repo_Commit=COMMIT,
                X_Linked_Etag=f'"{digest}"',
                X_Linked_Size=str(len(content)),
            )

        def content(self, name: str) -> None:
            content = hub.sent.get(name, hub.files[name])
            etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self.reply(200, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    return Handler


def _cdn_handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    """Where LFS files lie; it never sees a token."""

    class Handler(_Handler):
        def answer(self) -> None:
            hub.requests.append(Request(self.command, self.path, self.headers))
            name = self.path.removeprefix("/cdn/")
            content = hub.sent.get(name, hub.files[name])
            self.reply(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')

    return Handler


SOURCE = HubSource(repo_id=REPO, revision=COMMIT, licence="MIT")
FETCH = (
    "from pipeline.sources.hub import HubSource;"
    f"HubSource(repo_id={REPO!r}, revision={COMMIT!r}, licence='MIT').fetch();"
    "import sys; print('huggingface_hub' in sys.modules)"
)


def partial_files(cache: Path) -> Path:
    return cache / "weights/hub/acme--tiny" / f"{COMMIT}.partial" / "files"


def run_fetch(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FETCH],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
