"""Files of a package, from the disk to their keys, in one pass.

Each file is read once. While one thread reads and takes the SHA-256, others send what it has read;
what is hashed is what is sent. The SHA-256 is compared before anything shows: before a small file
is sent, and before a multipart upload is completed.

A key that holds the right bytes is not written again. The right bytes are: the right size and
SHA-256, as the server computed it or as our upload wrote it into the metadata, which it does only
when the hash held; of an object that tells neither, every byte is read back. Parts that a killed
run has sent are kept if their MD5, which S3 gives as their ETag, is that of the bytes read now.

Memory: `_IN_FLIGHT_BYTES` and no more, whatever the size. S3 takes 10,000 parts of an object
(Amazon S3 User Guide, "Multipart upload limits"), so parts grow with the file, and fewer fly.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.errors import CorruptError, PipelineError, TransientError
from pipeline.core.values import FileDigest
from pipeline.registry.disk import open_regular
from pipeline.registry.stores.s3.bucket import Bucket, Found
from pipeline.registry.stores.s3.claim import Claim
from pipeline.registry.stores.s3.crc32 import combined
from pipeline.registry.stores.s3.faults import code_of, missing, taken

log = logging.getLogger(__name__)

THREADS = 8
_IN_FLIGHT_BYTES = 80 << 20
_MAX_PARTS = 10_000
_ALIGN_BYTES = 1 << 20
_TRIES = 3  # of a whole file, whose upload others aborted


class _UploadLostError(Exception):
    """The multipart upload is not there any more, or holds other parts than we sent."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part that the server has.

    Attributes:
        number: From 1 on.
        etag: The server's name of its content.
        crc: CRC-32.
        size_bytes: Its size.
    """

    number: int
    etag: str
    crc: int
    size_bytes: int

    def to_json(self, checksums: bool) -> dict[str, Any]:
        """As CompleteMultipartUpload wants it."""
        check = {"ChecksumCRC32": _crc_text(self.crc)} if checksums else {}
        return {"PartNumber": self.number, "ETag": self.etag, **check}


@dataclass(kw_only=True)
class Uploader:
    """Sends files with a pool of threads; make it with `uploader`.

    Attributes:
        bucket: Where to.
        part_bytes: Size of a part, unless the file needs larger ones.
        claim: Ours; renewed now and then, and asked before anything is overwritten.
        on_bytes: Called with the number of bytes that were sent.
    """

    bucket: Bucket
    part_bytes: int
    claim: Claim
    on_bytes: Callable[[int], None]
    pool: ThreadPoolExecutor
    _small: deque[Future[None]] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, source: Path, file: FileDigest, key: str) -> None:
        """Send one file, unless its key holds the right bytes; small ones go on behind.

        Raises:
            CorruptError: It is not what `file` says; nothing of it shows.
        """
        self.claim.keep()
        found = self.bucket.head(key)
        if found is not None and self.right(found, file):
            return
        if file.size_bytes > self.part_bytes:
            self.finish()  # or their bytes would be in memory, too
            self._send_large(source, file, key)
            return
        data = _whole(source, file)
        while len(self._small) >= THREADS:
            self._small.popleft().result()
        self._small.append(self.pool.submit(self._send_small, key, data, file))

    def finish(self) -> None:
        """Wait until everything was sent."""
        while self._small:
            self._small.popleft().result()

    def right(self, found: Found, file: FileDigest) -> bool:
        """Whether an object holds the bytes of a file."""
        if found.size_bytes != file.size_bytes or found.checked not in {"", file.sha256}:
            return False
        if found.sha256 or found.checked:
            return found.sha256 in {"", file.sha256}
        digest = hashlib.sha256()
        response = self.bucket.call("get_object", found.key, IfMatch=found.etag)
        with contextlib.closing(response["Body"]) as body:
            while chunk := body.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest() == file.sha256

    def _send_small(self, key: str, data: bytearray, file: FileDigest) -> None:
        created = self.bucket.create(key, data, file.sha256)
        for _ in range(_TRIES):
            if created:
                self._sent(len(data))
                return
            found = self.bucket.head(key)
            if found is None:
                created = self.bucket.create(key, data, file.sha256)
            elif self.right(found, file):
                return
            else:  # of a run whose claim was taken over
                self.claim.require()
                created = self.bucket.replace(key, data, found.etag, file.sha256)
        raise TransientError(f"others keep writing {key}; run the same command again")

    def _send_large(self, source: Path, file: FileDigest, key: str) -> None:
        for _ in range(_TRIES):
            with contextlib.suppress(_UploadLostError):
                self._send_parts(source, file, key)
                break
            found = self.bucket.head(key)
            if found is not None and self.right(found, file):
                break
        else:
            raise TransientError(f"others keep writing {key}; run the same command again")
        for other, upload_id, _ in self.bucket.uploads(key):  # of killed runs, or of slower ones
            if other == key:
                self.bucket.abort(key, upload_id)

    def _send_parts(self, source: Path, file: FileDigest, key: str) -> None:
        """Send what is missing of a multipart upload, and complete it."""
        part_bytes = _part_bytes(file, self.part_bytes)
        upload_id, there = self._resume(key, part_bytes, file) or (self._begin(key, file), {})
        slots = threading.BoundedSemaphore(max(2, min(THREADS, _IN_FLIGHT_BYTES // part_bytes)))
        digest = hashlib.sha256()
        waiting: deque[Future[Part]] = deque()
        parts: list[Part] = []
        try:
            with open_regular(source) as stream:
                for number in range(1, -(-file.size_bytes // part_bytes) + 1):
                    slots.acquire()
                    left = file.size_bytes - (number - 1) * part_bytes
                    data = bytearray(min(part_bytes, left))
                    if stream.readinto(data) != len(data):
                        raise _changed(source)
                    digest.update(data)
                    job = self.pool.submit(
                        self._send_part, key, upload_id, number, data, there.get(number, "")
                    )
                    job.add_done_callback(lambda _: slots.release())
                    waiting.append(job)
                    del data
                    while waiting and waiting[0].done():
                        parts.append(waiting.popleft().result())
                    self.claim.keep()
                if stream.read(1) or digest.hexdigest() != file.sha256:
                    raise _changed(source)
            parts += [job.result() for job in waiting]
        except BaseException as error:
            for job in waiting:
                job.cancel()
            if isinstance(error, CorruptError):
                self.bucket.abort(key, upload_id)
            raise
        self._complete(key, upload_id, parts, file)

    def _begin(self, key: str, file: FileDigest) -> str:
        checks = {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"}
        response = self.bucket.checked_call(
            "create_multipart_upload",
            key,
            checks,
            Metadata={"sha256": file.sha256},
            ContentType="application/octet-stream",
        )
        return str(response["UploadId"])

    def _resume(
        self, key: str, part_bytes: int, file: FileDigest
    ) -> tuple[str, dict[int, str]] | None:
        """The open upload of this key that has come farthest: its id, and ETags by part number."""
        best: tuple[str, dict[int, str]] | None = None
        for other, upload_id, _ in list(self.bucket.uploads(key)):
            if other != key:
                continue
            pages = self.bucket.client.get_paginator("list_parts").paginate(
                Bucket=self.bucket.address.bucket, Key=key, UploadId=upload_id
            )
            try:
                parts = [part for page in pages for part in page.get("Parts", ())]
            except self.bucket.client.exceptions.ClientError as error:
                if not missing(error):
                    raise
                continue  # completed or aborted meanwhile
            fits = all(
                part["Size"]
                == min(part_bytes, file.size_bytes - (part["PartNumber"] - 1) * part_bytes)
                for part in parts
            )
            if fits and (best is None or len(parts) > len(best[1])):
                best = upload_id, {part["PartNumber"]: part["ETag"] for part in parts}
        if best is not None:
            log.info("Going on with an upload of %s: %d parts are there", key, len(best[1]))
        return best

    def _send_part(
        self, key: str, upload_id: str, number: int, data: bytearray, there: str
    ) -> Part:
        """Send one part, unless the server has it under the ETag `there`."""
        from botocore.exceptions import ClientError

        crc = zlib.crc32(data)
        if there and there.strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest():
            return Part(number=number, etag=there, crc=crc, size_bytes=len(data))
        try:
            response = self.bucket.checked_call(
                "upload_part",
                key,
                {"ChecksumCRC32": _crc_text(crc)},
                UploadId=upload_id,
                PartNumber=number,
                Body=data,
            )
        except ClientError as error:
            if missing(error):
                raise _UploadLostError from error
            raise
        self._sent(len(data))
        return Part(number=number, etag=response["ETag"], crc=crc, size_bytes=len(data))

    def _complete(self, key: str, upload_id: str, parts: list[Part], file: FileDigest) -> None:
        """Make the object visible, unless the right one is there already.

        Whatever the reply was, or if it got lost: what counts is what lies there afterwards.
        """
        crc = 0
        for part in parts:
            crc = combined(crc, part.crc, part.size_bytes)
        checks = {
            "ChecksumCRC32": _crc_text(crc),
            "ChecksumType": "FULL_OBJECT",
            "MpuObjectSize": file.size_bytes,
            "MultipartUpload": {"Parts": [part.to_json(True) for part in parts]},
        }
        condition = {"IfNoneMatch": "*"}
        for _ in range(_TRIES):
            self._try_complete(key, upload_id, parts, checks, condition)
            found = self.bucket.head(key)
            if found is not None and self.right(found, file):
                return
            if found is None:
                raise _UploadLostError
            self.claim.require()
            condition = {"IfMatch": found.etag}  # of a run whose claim was taken over
        raise _UploadLostError

    def _try_complete(
        self,
        key: str,
        upload_id: str,
        parts: list[Part],
        checks: Mapping[str, Any],
        condition: Mapping[str, str],
    ) -> None:
        from botocore.exceptions import ClientError

        arguments = {
            "UploadId": upload_id,
            "MultipartUpload": {"Parts": [part.to_json(False) for part in parts]},
            **condition,
        }
        try:
            self.bucket.checked_call("complete_multipart_upload", key, checks, **arguments)
        except ClientError as error:
            # A race (409): the upload has to be begun anew (Amazon S3 API Reference,
            # CompleteMultipartUpload, "ConditionalRequestConflict").
            conflict = code_of(error) in {"ConditionalRequestConflict", "InvalidPart", "409"}
            if not (taken(error) or missing(error) or conflict):
                raise
            if conflict:
                self.bucket.abort(key, upload_id)

    def _sent(self, count: int) -> None:
        with self._lock:
            self.on_bytes(count)


@contextlib.contextmanager
def uploader(
    bucket: Bucket, part_bytes: int, claim: Claim, on_bytes: Callable[[int], None]
) -> Iterator[Uploader]:
    """An `Uploader` whose threads have ended after the block."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="upload")
    try:
        made = Uploader(
            bucket=bucket, part_bytes=part_bytes, claim=claim, on_bytes=on_bytes, pool=pool
        )
        yield made
        made.finish()
    finally:
        pool.shutdown(cancel_futures=True)


def _whole(source: Path, file: FileDigest) -> bytearray:
    """The bytes of a small file, compared with its SHA-256."""
    data = bytearray(file.size_bytes)
    with open_regular(source) as stream:
        if stream.readinto(data) != len(data) or stream.read(1):
            raise _changed(source)
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise _changed(source)
    return data


def _part_bytes(file: FileDigest, wanted: int) -> int:
    """Size of the parts of a file; the same in every run, so that one goes on with another's."""
    needed = -(-file.size_bytes // _MAX_PARTS)
    size = max(wanted, -(-needed // _ALIGN_BYTES) * _ALIGN_BYTES)
    if size > _IN_FLIGHT_BYTES // 2:
        raise PipelineError(
            f"{file.path} has {file.size_bytes} bytes, S3 takes "
            f"{_MAX_PARTS * (_IN_FLIGHT_BYTES // 2)} in the memory that publishing may use; "
            "split the engine over more files"
        )
    return size


def _changed(source: Path) -> CorruptError:
    return CorruptError(f"{source} is not what its manifest says; get the package again")


def _crc_text(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(4, "big")).decode()
