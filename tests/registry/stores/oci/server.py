"""A small OCI registry in memory, with what docker-registry lacks.

It has the referrers API (unless `native` is off), Bearer or Basic authorization, and blobs on
another host.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

from pipeline.registry.stores.oci.registry import OciRegistry
from pipeline.registry.stores.publication import WritableStore
from tests.registry.stores.faulty import FaultyHandler, FaultyServer

USER, PASSWORD = "builder", "s3cret"
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
"""What the right user sends."""
_INDEX = "application/vnd.oci.image.index.v1+json"


class FakeRegistry(FaultyServer):
    """The state of one server; see the module."""

    def __init__(self) -> None:
        super().__init__(Handler)
        self.native = True  # has the referrers API
        self.auth = ""  # "", "bearer" or "basic"
        self.blobs_at = ""  # another host that has the blobs
        self.blobs: dict[str, bytes] = {}
        self.uploads: dict[str, bytearray] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.tokens: set[str] = set()

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


class Handler(FaultyHandler):
    server: FakeRegistry

    def respond(self) -> None:
        if self.where == "/token":
            self._token()
        elif self._allowed():
            self._api()

    def refuse(self, status: int, code: str, **headers: str) -> None:
        errors = [{"code": code, "message": "as the test wants"}]
        self.json({"errors": errors}, status, **headers)

    def json(
        self, value: object, status: int = 200, *, kind: str = "application/json", **headers: str
    ) -> None:
        self.answer(status, json.dumps(value).encode(), kind, **headers)

    def _allowed(self) -> bool:
        sent = self.headers.get("Authorization", "")
        if not self.server.auth:
            return True
        if self.server.auth == "basic":
            if sent != BASIC:
                self.refuse(401, "UNAUTHORIZED", WWW_Authenticate='Basic realm="x"')
            return sent == BASIC
        if sent.removeprefix("Bearer ") in self.server.tokens:
            return True
        repository = re.sub(r"^/v2/(.*)/(manifests|blobs|tags|referrers)/.*$", r"\1", self.path)
        action = "pull" if self.command in {"GET", "HEAD"} else "pull,push"
        challenge = (
            f'Bearer realm="http://{self.server.host}/token",service="fake",'
            f'scope="repository:{repository}:{action}"'
        )
        self.refuse(401, "UNAUTHORIZED", WWW_Authenticate=challenge)
        return False

    def _token(self) -> None:
        if self.headers.get("Authorization") != BASIC:
            self.refuse(401, "UNAUTHORIZED")
            return
        token = f"token-{len(self.server.tokens)}-{self.query['scope']}"
        self.server.tokens.add(token)
        self.json({"token": token})

    def _api(self) -> None:
        kinds = "manifests|blobs|tags|referrers|_catalog"
        match = re.fullmatch(rf"/v2/(?:(.+)/)?({kinds})/?(.*)", self.where)
        if match is None:
            self.refuse(404, "NOT_FOUND")
            return
        repository, kind, rest = match[1] or "", match[2], match[3]
        if kind == "manifests":
            self._manifest(repository, rest)
        elif kind == "blobs" and rest.startswith("uploads/"):
            self._upload(repository, rest.removeprefix("uploads/"))
        elif kind == "blobs":
            self._blob(rest)
        elif kind == "referrers" and not self.server.native:
            self.refuse(404, "NOT_FOUND")
        elif kind == "referrers":
            self._page(self.server.referrers(repository, rest), "manifests", _INDEX)
        elif kind == "_catalog":
            self._page(sorted({where for where, _ in self.server.manifests}), "repositories")
        else:
            tags = [t for where, t in self.server.manifests if where == repository]
            self._page([tag for tag in tags if not tag.startswith("sha256:")], "tags")

    def _page(self, items: list[Any], key: str, kind: str = "application/json") -> None:
        start = int(self.query.get("from", "0"))
        end = start + self.server.page
        link = {"Link": f'<{self.where}?from={end}>; rel="next"'} if end < len(items) else {}
        self.json({key: items[start:end]}, 200, kind=kind, **link)

    def _manifest(self, repository: str, reference: str) -> None:
        manifests = self.server.manifests
        if self.command == "PUT":
            digest = f"sha256:{hashlib.sha256(self.body).hexdigest()}"
            entry = (self.headers["Content-Type"], self.body)
            manifests[repository, reference] = manifests[repository, digest] = entry
            self.answer(201, Docker_Content_Digest=digest)
        elif (repository, reference) not in manifests:
            self.refuse(404, "MANIFEST_UNKNOWN")
        elif self.command == "DELETE":
            gone = manifests[repository, reference]
            for key in [key for key, entry in manifests.items() if entry == gone]:
                del manifests[key]
            self.answer(202)
        else:
            kind, data = manifests[repository, reference]
            self.answer(200, data, kind)

    def _upload(self, repository: str, name: str) -> None:
        uploads = self.server.uploads
        if self.command == "POST":
            name = str(len(self.server.seen))
            uploads[name] = bytearray()
        location = f"/v2/{repository}/blobs/uploads/{name}?state=1"
        if name not in uploads:
            self.refuse(404, "BLOB_UPLOAD_UNKNOWN")
        elif self.command == "POST":
            self.answer(202, Location=location)
        elif self.command == "DELETE":
            del uploads[name]
            self.answer(204)
        elif self.command == "PATCH":
            if int(self.headers["Content-Range"].partition("-")[0]) != len(uploads[name]):
                self.refuse(416, "BLOB_UPLOAD_INVALID")
                return
            uploads[name] += self.body
            self.answer(202, Location=location)
        else:
            digest, data = self.query["digest"], bytes(uploads.pop(name)) + self.body
            if digest != f"sha256:{hashlib.sha256(data).hexdigest()}":
                self.refuse(400, "DIGEST_INVALID")
                return
            self.server.blobs[digest] = data
            self.answer(201)

    def _blob(self, digest: str) -> None:
        if digest not in self.server.blobs:
            self.refuse(404, "BLOB_UNKNOWN")
        elif self.server.blobs_at and self.command == "GET":
            where = f"http://{self.server.blobs_at}{self.path}?signature=hidden"
            self.answer(307, Location=where)
        else:
            self.answer_range(self.server.blobs[digest])
