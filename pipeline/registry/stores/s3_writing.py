"""Writing to a bucket: the few requests that a publisher makes.

Files go out by boto3's transfer manager, from a reader that takes SHA-256 and CRC-32 on the way:
what is hashed is what is sent. The CRC-32 of the whole object is what S3 tells of it afterwards
(Amazon S3 User Guide, "Checking object integrity", full object checksums); a server that tells none
is read back.

A request whose reply got lost is repeated by botocore, and then meets what it wrote itself. That
does no harm: what is created here has a name that follows from its bytes, or is read back.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import mimetypes
import secrets
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.errors import AccessError, CorruptError, TransientError
from pipeline.core.values import FileDigest
from pipeline.registry.disk import checked_chunks
from pipeline.registry.store import OnBytes, in_parallel
from pipeline.registry.stores import transfer
from pipeline.registry.stores.s3 import S3Objects, found_in, missing, raced, taken
from pipeline.registry.stores.tree import Found

_THREADS = 8
_MAX_PARTS = 9_000  # S3 takes 10,000 (Amazon S3 User Guide, "Multipart upload limits")
_PROBE = ".writable-"


@dataclass(frozen=True, kw_only=True)
class WritableS3Objects(S3Objects):
    """`pipeline.registry.stores.publication.WritableObjects`, in a bucket.

    Attributes:
        part_bytes: Size of the parts of a large file, unless it needs larger ones.
    """

    part_bytes: int
    _crcs: dict[str, int] = field(default_factory=dict)
    """SHA-256 -> CRC-32 of files that were read."""

    def find(self, key: str) -> Found | None:
        head = self._head(key)
        return None if head is None else found_in(key, _size_of(head), head.get("LastModified"))

    def create(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        with self.errors(f"write {key} to"):
            try:
                self._put(key, data, IfNoneMatch="*")
            except ClientError as error:
                if not taken(error):
                    raise
                return False
            return True

    def replace(self, key: str, data: bytes) -> None:
        with self.errors(f"write {key} to"):
            self._put(key, data)

    def put_file(self, key: str, source: Path, file: FileDigest, on_bytes: OnBytes) -> None:
        from boto3.s3.transfer import TransferConfig

        part_bytes = max(self.part_bytes, -(-file.size_bytes // _MAX_PARTS))
        config = TransferConfig(
            multipart_threshold=part_bytes,
            multipart_chunksize=part_bytes,
            max_concurrency=_THREADS,
            preferred_transfer_client="classic",
        )
        extra = {"ContentType": "application/octet-stream"}
        with self.errors(f"publish {key} to"):
            if self.client().meta.config.request_checksum_calculation.lower() != "when_required":
                extra |= {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"}
            reader = _Reader(chunks=checked_chunks(source, file))
            self.client().upload_fileobj(
                reader, Bucket=self.bucket, Key=f"{self.root}{key}", ExtraArgs=extra,
                Config=config, Callback=on_bytes,
            )  # fmt: skip
            self._crcs[file.sha256] = reader.crc
        if not self.holds(key, source, file):
            advice = "nothing shows yet: look after the store, then run the same command again"
            raise CorruptError(f"{self.url}: {key} is not there as it was sent; {advice}")

    def holds(self, key: str, source: Path, file: FileDigest) -> bool:
        head = self._head(key)
        if head is None or _size_of(head) != file.size_bytes:
            return False
        text = head.get("ChecksumCRC32", "")
        # `...-2` is a checksum of the checksums of two parts.
        if text and "-" not in text and head.get("ChecksumType") != "COMPOSITE":
            return int.from_bytes(base64.b64decode(text), "big") == self._crc_of(source, file)
        digest = hashlib.sha256()
        with self.stream(key, 0, None) as chunks:
            for chunk in chunks:
                digest.update(chunk)
        return digest.hexdigest() == file.sha256

    def delete(self, keys: Iterable[str]) -> None:
        with self.errors("remove from"):
            for _ in in_parallel(lambda key: self.call("delete_object", key), keys):
                pass

    def now_s(self) -> float:
        with self.errors("read the clock of"):
            response = self.call("list_objects_v2", Prefix=self.root, MaxKeys=1)
        date = response["ResponseMetadata"]["HTTPHeaders"].get("date", "")
        try:
            return email.utils.parsedate_to_datetime(date).timestamp()
        except ValueError:
            return time.time()

    def unfinished(self, min_age_s: float, *, delete: bool) -> Iterator[str]:
        newest_s = self.now_s() - min_age_s
        with self.errors("clean"):
            for page in self.pages("list_multipart_uploads", Prefix=self.root):
                for entry in page.get("Uploads", ()):
                    key = entry["Key"].removeprefix(self.root)
                    if entry["Initiated"].timestamp() <= newest_s:
                        if delete:
                            self._abort(key, entry["UploadId"])
                        yield f"{key} (unfinished upload)"
        for found in self.listed(_PROBE):
            if found.modified_s <= newest_s:
                if delete:
                    self.delete([found.key])
                yield f"{found.key} (left by a check)"

    def check_writable(self) -> None:
        key = f"{_PROBE}{secrets.token_hex(8)}"
        self.create(key, b"1")
        exclusive = not self.create(key, b"2")
        with contextlib.suppress(AccessError):  # write-only credentials are enough to publish
            self.delete([key])
        if not exclusive:
            fault = "this server ignores If-None-Match, so a manifest could be overwritten"
            raise AccessError(f"cannot publish to {self.url}: {fault}; use another registry")

    def _head(self, key: str) -> Any:
        from botocore.exceptions import ClientError

        with self.errors(f"read {key} in"):
            try:
                return self.call("head_object", key, ChecksumMode="ENABLED")
            except ClientError as error:
                if missing(error):
                    return None
                raise

    def _put(self, key: str, data: bytes, **condition: str) -> None:
        """Write a small object, again as long as another writer crosses it (409)."""
        from botocore.exceptions import ClientError

        kind = mimetypes.guess_type(key)[0] or "application/octet-stream"
        for attempt in range(1, transfer.ATTEMPTS + 1):
            try:
                self.call("put_object", key, Body=data, ContentType=kind, **condition)
                return
            except ClientError as error:
                if not raced(error):
                    raise
                time.sleep(0.1 * 2**attempt * secrets.SystemRandom().uniform(0.5, 1))
        raise TransientError(f"{self.url}: others keep writing {key}; run the same command again")

    def _abort(self, key: str, upload_id: str) -> None:
        from botocore.exceptions import ClientError

        try:
            self.call("abort_multipart_upload", key, UploadId=upload_id)
        except ClientError as error:
            if not missing(error):
                raise

    def _crc_of(self, source: Path, file: FileDigest) -> int:
        if file.sha256 not in self._crcs:
            crc = 0
            for chunk in checked_chunks(source, file):
                crc = zlib.crc32(chunk, crc)
            self._crcs[file.sha256] = crc
        return self._crcs[file.sha256]


@dataclass(kw_only=True)
class _Reader:
    """What boto3 reads a file from; it raises with the last byte if they are the wrong bytes."""

    chunks: Iterator[bytes]
    crc: int = 0
    _held: bytearray = field(default_factory=bytearray)

    def read(self, count: int = sys.maxsize) -> bytes:
        # One byte more is wanted: the chunks compare what they gave when they are asked for more,
        # and boto3 may not ask again before it completes the object.
        while len(self._held) <= count and (chunk := next(self.chunks, b"")):
            self._held += chunk
        data = bytes(self._held[:count])
        del self._held[:count]
        self.crc = zlib.crc32(data, self.crc)
        return data


def _size_of(head: Any) -> int:
    """The size of an object; -1, which no file has, where the server does not tell."""
    return int(head.get("ContentLength", -1))
