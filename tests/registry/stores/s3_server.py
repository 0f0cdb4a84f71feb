"""A small S3 in memory: what our store asks for, of one bucket, without authentication."""

from __future__ import annotations

import base64
import hashlib
import re
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote
from xml.sax.saxutils import escape

from tests.registry.stores.faulty import FaultyHandler, FaultyServer

BUCKET = "bucket"


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


class MemoryS3(FaultyServer):
    def __init__(self) -> None:
        super().__init__(Handler)
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, Upload] = {}
        self.checksums = True


class Handler(FaultyHandler):
    server: MemoryS3

    def respond(self) -> None:
        bucket, _, self.key = self.where.lstrip("/").partition("/")
        if bucket != BUCKET:
            self.refuse(404, "NoSuchBucket")
            return
        with self.server.lock:
            send = self._answer()
        send()

    def refuse(self, status: int, code: str, **headers: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>as the test asked</Message></Error>"
        self.answer(status, body.encode(), **headers)

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
                name = f"upload-{len(self.server.seen)}"
                whole = self.headers.get("x-amz-checksum-type") == "FULL_OBJECT"
                self.server.uploads[name] = Upload(key=self.key, whole=whole)
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
        return self._reply(200, ETag=stored.etag)

    def _put_part(self) -> Callable[[], None]:
        upload = self.server.uploads.get(self.query["uploadId"])
        if upload is None:
            return self._refusal(404, "NoSuchUpload")
        upload.parts[int(self.query["partNumber"])] = self.body
        return self._reply(200, ETag=_etag(self.body))

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
        modified = self.date_time_string(int(stored.modified_s))
        headers = {"ETag": stored.etag, "Last-Modified": modified}
        if self.headers.get("x-amz-checksum-mode") == "ENABLED" and self.server.checksums:
            crc = base64.b64encode(zlib.crc32(stored.data).to_bytes(4, "big")).decode()
            headers["x-amz-checksum-crc32"] = crc if stored.whole else f"{crc}-2"
            headers["x-amz-checksum-type"] = "FULL_OBJECT" if stored.whole else "COMPOSITE"
        return lambda: self.answer_range(stored.data, **headers)

    def _list(self) -> Callable[[], None]:
        prefix, after = self.query.get("prefix", ""), self.query.get("continuation-token", "")
        objects = self.server.objects
        keys = [key for key in sorted(objects) if key.startswith(prefix) and key > after]
        more = len(keys) > self.server.page
        encoding = self.query.get("encoding-type", "")  # else XML could not have every key
        named = quote if encoding == "url" else str
        keys = keys[: min(self.server.page, int(self.query.get("max-keys", 1000)))]
        entries = [
            f"<Contents><Key>{escape(named(key))}</Key><Size>{len(objects[key].data)}</Size>"
            f"<LastModified>{_iso(objects[key].modified_s)}</LastModified></Contents>"
            for key in keys
        ]
        entries.append(f"<EncodingType>{encoding}</EncodingType>" if encoding else "")
        if more:
            entries.append(f"<NextContinuationToken>{escape(keys[-1])}</NextContinuationToken>")
        entries.append(f"<IsTruncated>{str(more).lower()}</IsTruncated>")
        return self._xml("ListBucketResult", "".join(entries))

    def _list_uploads(self) -> Callable[[], None]:
        entries = [
            f"<Upload><Key>{escape(upload.key)}</Key><UploadId>{name}</UploadId>"
            f"<Initiated>{_iso(upload.begun_s)}</Initiated></Upload>"
            for name, upload in self.server.uploads.items()
            if upload.key.startswith(self.query.get("prefix", ""))
        ]
        return self._xml("ListMultipartUploadsResult", "".join(entries))

    def _refusal(self, status: int, code: str) -> Callable[[], None]:
        return lambda: self.refuse(status, code)

    def _xml(self, root: str, inner: str) -> Callable[[], None]:
        return self._reply(200, f"<{root}>{inner}</{root}>".encode())

    def _reply(self, status: int, body: bytes = b"", **headers: str) -> Callable[[], None]:
        return lambda: self.answer(status, body, **headers)


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _iso(time_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s))
