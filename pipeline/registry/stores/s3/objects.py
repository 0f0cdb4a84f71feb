"""The objects of a bucket: the few requests that a registry makes.

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
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.core.errors import AccessError, CorruptError, PipelineError, TransientError
from pipeline.core.values import FileDigest
from pipeline.registry.disk import open_regular
from pipeline.registry.store import OnBytes
from pipeline.registry.stores.objects import Found, in_parallel
from pipeline.registry.stores.s3.connection import Connection
from pipeline.registry.stores.s3.faults import code_of, missing, raced, s3_errors, status_of, taken
from pipeline.registry.stores.transfer import ATTEMPTS, CHUNK_BYTES, at_pace, joined

_THREADS = 8
_MAX_PARTS = 9_000  # S3 takes 10,000 (Amazon S3 User Guide, "Multipart upload limits")
_MAX_PAGES = 3_000
"""Three million objects; a server that lists more is not a registry, or never ends."""
_PROBE = ".writable-"


@dataclass(frozen=True, kw_only=True)
class S3Objects:
    """`pipeline.registry.stores.objects.Objects`, in a bucket.

    Attributes:
        url: For messages.
        connection: How to reach it.
        part_bytes: Size of the parts of a large file, unless it needs larger ones.
    """

    url: str
    connection: Connection
    part_bytes: int
    _crcs: dict[str, int] = field(default_factory=dict)
    """SHA-256 -> CRC-32 of files that were read."""

    def find(self, key: str) -> Found | None:
        head = self._head(key)
        return None if head is None else _found(key, _size_of(head), head.get("LastModified"))

    def listed(self, prefix: str) -> Iterator[Found]:
        root = self.connection.root
        with self._errors("list"):
            for page in self._pages("list_objects_v2", Prefix=f"{root}{prefix}"):
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(root)
                    yield _found(key, entry.get("Size", -1), entry.get("LastModified"))

    def read(self, key: str, limit_bytes: int) -> bytes | None:
        with self._errors(f"read {key} in"):
            for _ in range(ATTEMPTS - 1):
                with contextlib.suppress(*_broken()):
                    return self._read(key, limit_bytes)
            return self._read(key, limit_bytes)

    @contextlib.contextmanager
    def stream(self, key: str, offset: int, end: int | None) -> Iterator[Iterator[bytes]]:
        if end is not None and end <= offset:
            yield iter(())
            return
        with self._errors(f"read {key} in"):
            asked = f"bytes={offset}-{'' if end is None else end - 1}"
            response = self._get(key, Range=asked)
            if response is None:
                yield iter(())
                return
            with contextlib.closing(response["Body"]) as body:
                skip = _bytes_before(response, key, offset)
                yield _skipping(at_pace(_reader(body), f"{self.url}: {key}"), skip)

    def create(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        with self._errors(f"write {key} to"):
            try:
                self._put(key, data, IfNoneMatch="*")
            except ClientError as error:
                if not taken(error):
                    raise
                return False
            return True

    def replace(self, key: str, data: bytes) -> None:
        with self._errors(f"write {key} to"):
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
        if self.connection.sends_checksums():
            extra |= {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"}
        with self._errors(f"publish {key} to"), open_regular(source) as stream:
            reader = _Reader(stream=stream, source=source, file=file)
            self.connection.client().upload_fileobj(
                reader, Key=self._key(key), ExtraArgs=extra, Config=config, Callback=on_bytes,
                Bucket=self.connection.bucket,
            )  # fmt: skip
            self._crcs[file.sha256] = reader.crc
        if not self.holds(key, source, file):
            raise CorruptError(
                f"{self.url}: {key} is not there as it was sent; nothing shows yet: look after the "
                "store, then run the same command again"
            )

    def holds(self, key: str, source: Path, file: FileDigest) -> bool:
        head = self._head(key)
        if head is None or _size_of(head) != file.size_bytes:
            return False
        if (crc := _full_crc(head)) is not None:
            return crc == self._crc_of(source, file)
        digest = hashlib.sha256()
        with self.stream(key, 0, None) as chunks:
            for chunk in chunks:
                digest.update(chunk)
        return digest.hexdigest() == file.sha256

    def delete(self, keys: Iterable[str]) -> None:
        with self._errors("remove from"):
            for _ in in_parallel(lambda key: self._call("delete_object", key), keys):
                pass

    def now_s(self) -> float:
        with self._errors("read the clock of"):
            root = self.connection.root
            response = self._call("list_objects_v2", Prefix=root, MaxKeys=1)
        date = response["ResponseMetadata"]["HTTPHeaders"].get("date", "")
        try:
            return email.utils.parsedate_to_datetime(date).timestamp()
        except ValueError:
            return time.time()

    def unfinished(self, min_age_s: float, *, delete: bool) -> Iterator[str]:
        newest_s = self.now_s() - min_age_s
        root = self.connection.root
        with self._errors("clean"):
            for page in self._pages("list_multipart_uploads", Prefix=root):
                for entry in page.get("Uploads", ()):
                    if entry["Initiated"].timestamp() <= newest_s:
                        if delete:
                            self._abort(entry["Key"], entry["UploadId"])
                        yield f"{entry['Key'].removeprefix(root)} (unfinished upload)"
        for found in self.listed(_PROBE):
            if found.modified_s <= newest_s:
                if delete:
                    self.delete([found.key])
                yield f"{found.key} (left by a check)"

    def check_exclusive(self) -> None:
        key = f"{_PROBE}{secrets.token_hex(8)}"
        self.create(key, b"1")
        exclusive = not self.create(key, b"2")
        with contextlib.suppress(AccessError):  # write-only credentials are enough to publish
            self.delete([key])
        if not exclusive:
            raise AccessError(
                f"cannot publish to {self.url}: this server ignores If-None-Match, so a manifest "
                "could be overwritten; upgrade it, or use another registry"
            )

    def _read(self, key: str, limit_bytes: int) -> bytes | None:
        response = self._get(key)
        if response is None:
            return None
        with contextlib.closing(response["Body"]) as body:
            if "ContentLength" not in response:  # then its end could be a connection that broke
                raise TransientError(f"{self.url}: {key} comes without its size; try again")
            what = f"{self.url}: {key}"
            return joined(at_pace(_reader(body), what), limit_bytes, what)

    def _get(self, key: str, **arguments: str) -> Any:
        """The response to a GET; None if there is no such object, or no such byte."""
        from botocore.exceptions import ClientError

        try:
            return self._call("get_object", key, **arguments)
        except ClientError as error:
            if status_of(error) == 416 or code_of(error) == "InvalidRange":
                return None
            if missing(error) and not arguments:
                return None
            raise

    def _head(self, key: str) -> Any:
        from botocore.exceptions import ClientError

        with self._errors(f"read {key} in"):
            try:
                return self._call("head_object", key, ChecksumMode="ENABLED")
            except ClientError as error:
                if missing(error):
                    return None
                raise

    def _put(self, key: str, data: bytes, **condition: str) -> None:
        """Write a small object, again as long as another writer crosses it (409)."""
        from botocore.exceptions import ClientError

        kind = mimetypes.guess_type(key)[0] or "application/octet-stream"
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._call("put_object", key, Body=data, ContentType=kind, **condition)
                return
            except ClientError as error:
                if not raced(error):
                    raise
                time.sleep(0.1 * 2**attempt * secrets.SystemRandom().uniform(0.5, 1))
        raise TransientError(f"{self.url}: others keep writing {key}; run the same command again")

    def _abort(self, key: str, upload_id: str) -> None:
        from botocore.exceptions import ClientError

        client = self.connection.client()
        try:
            client.abort_multipart_upload(
                Bucket=self.connection.bucket, Key=key, UploadId=upload_id
            )
        except ClientError as error:
            if not missing(error):
                raise

    def _crc_of(self, source: Path, file: FileDigest) -> int:
        if file.sha256 not in self._crcs:
            with open_regular(source) as stream:
                reader = _Reader(stream=stream, source=source, file=file)
                while reader.read(CHUNK_BYTES):
                    pass
                self._crcs[file.sha256] = reader.crc
        return self._crcs[file.sha256]

    def _call(self, operation: str, key: str | None = None, **arguments: Any) -> Any:
        """Send one request; botocore repeats it a few times."""
        if key is not None:
            arguments["Key"] = self._key(key)
        send: Callable[..., Any] = getattr(self.connection.client(), operation)
        return send(Bucket=self.connection.bucket, **arguments)

    def _pages(self, operation: str, **arguments: Any) -> Iterator[Any]:
        paginator = self.connection.client().get_paginator(operation)
        pages = paginator.paginate(Bucket=self.connection.bucket, **arguments)
        for number, page in enumerate(pages):
            if number >= _MAX_PAGES:
                raise PipelineError(f"{self.url} lists more than {_MAX_PAGES} pages; check the URL")
            yield page

    def _key(self, key: str) -> str:
        return f"{self.connection.root}{key}"

    def _errors(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return s3_errors(f"{doing} {self.url}", self.connection.bucket)


@dataclass(kw_only=True)
class _Reader:
    """What boto3 reads a file from: hashed on its way; its end raises if it is the wrong file."""

    stream: BinaryIO
    source: Path
    file: FileDigest
    crc: int = 0
    _sha256: Any = field(default_factory=hashlib.sha256)
    _size_bytes: int = 0

    def read(self, count: int = -1) -> bytes:
        data = self.stream.read(count)
        self._sha256.update(data)
        self.crc = zlib.crc32(data, self.crc)
        self._size_bytes += len(data)
        # At the last byte already: boto3 may not ask for more before it completes the object.
        ended = not data or self._size_bytes >= self.file.size_bytes
        if ended and (self._size_bytes, self._sha256.hexdigest()) != (
            self.file.size_bytes,
            self.file.sha256,
        ):
            raise CorruptError(
                f"{self.source} is not what its manifest says; get the package again"
            )
        return data


def _broken() -> tuple[type[Exception], ...]:
    """What is raised while a body is read whose connection broke."""
    from botocore.exceptions import HTTPClientError, IncompleteReadError
    from urllib3.exceptions import HTTPError

    return HTTPClientError, IncompleteReadError, HTTPError, ConnectionError, TimeoutError


def _reader(body: Any) -> Callable[[int], bytes]:
    """Reads what has arrived of a body; botocore's own methods wait until a chunk is full."""
    raw = body._raw_stream
    read: Callable[[int], bytes] = raw.read1
    return read


def _bytes_before(response: Any, key: str, offset: int) -> int:
    """How many bytes of a response come before the first that was asked for."""
    stated = response.get("ContentRange")
    if stated is None:
        return offset  # a server that knows no ranges sends all
    if not str(stated).startswith(f"bytes {offset}-"):
        raise TransientError(f"asked {key} from byte {offset} on, got {stated!r}; try again")
    return 0


def _skipping(chunks: Iterator[bytes], skip: int) -> Iterator[bytes]:
    for chunk in chunks:
        if skip < len(chunk):
            yield chunk[skip:] if skip else chunk
        skip = max(skip - len(chunk), 0)


def _full_crc(head: Any) -> int | None:
    """The CRC-32 of a whole object as the server tells it; None if it tells none."""
    text = head.get("ChecksumCRC32", "")
    if not text or "-" in text or head.get("ChecksumType") == "COMPOSITE":
        return None  # `...-2` is a checksum of the checksums of two parts
    return int.from_bytes(base64.b64decode(text), "big")


def _size_of(head: Any) -> int:
    """The size of an object; -1, which no file has, where the server does not tell."""
    return int(head.get("ContentLength", -1))


def _found(key: str, size_bytes: int, modified: datetime | None) -> Found:
    """An object; one that the server does not date is new, so that nothing removes it."""
    modified_s = time.time() if modified is None else modified.timestamp()
    return Found(key=key, size_bytes=size_bytes, modified_s=modified_s)
