"""One bucket: the few requests that a registry makes, each with its outcome as a value.

A request whose reply got lost is repeated by botocore, and then meets what it wrote itself. So each
object that is created carries a random `put` in its metadata, by which its writer knows it again.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import logging
import mimetypes
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipeline.core.errors import CorruptError, TransientError
from pipeline.registry.stores.s3.address import Address
from pipeline.registry.stores.s3.faults import code_of, missing, raced, s3_errors, status_of, taken

log = logging.getLogger(__name__)

_TRIES = 4  # of a write that another one crossed (409)
_Result = TypeVar("_Result")
# How servers without these checksums refuse them; a wrong checksum has other codes.
_NO_CHECKSUMS = {"NotImplemented", "InvalidArgument", "InvalidRequest", "MalformedXML"}


@dataclass(frozen=True, kw_only=True)
class Found:
    """An object, unread.

    Attributes:
        key: Its key.
        size_bytes: Its size.
        etag: Names this very content; quotes included.
        modified_s: When it was written, Unix time, by the server's clock.
        sha256: What its writer says to have sent, hex; empty if it was not our upload, or if this
            comes from a listing, which does not tell.
        put: Which request created it.
        checked: Its SHA-256 as the server computed it, hex; empty if it did not.
    """

    key: str
    size_bytes: int
    etag: str
    modified_s: float
    sha256: str = ""
    put: str = ""
    checked: str = ""


@dataclass(frozen=True, kw_only=True)
class Content:
    """A small object and what it holds.

    Attributes:
        data: Its bytes.
        etag: Names this very content.
        age_s: How long ago it was written, by the server's clock.
    """

    data: bytes
    etag: str
    age_s: float


@dataclass(kw_only=True)
class Bucket:
    """A connection to a bucket; used by many threads.

    Attributes:
        client: Of boto3.
        address: Bucket and prefix.
        url: For messages.
        checksums: Whether checksums are sent; becomes False with a server that refuses them.
        client_without_checksums: Makes the client for such a server: it signs what it sends.
    """

    client: Any
    address: Address
    url: str
    checksums: bool
    client_without_checksums: Callable[[], Any]
    etags: dict[str, str] = field(default_factory=dict)
    """Key -> ETag of objects that are read in pieces (see `reading`)."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def errors(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """`s3_errors`, for this bucket."""
        return s3_errors(f"{doing} {self.url}", self.address.bucket)

    def call(self, operation: str, key: str | None = None, **arguments: Any) -> Any:
        """Send one request; botocore repeats it a few times."""
        if key is not None:
            arguments["Key"] = key
        return getattr(self.client, operation)(Bucket=self.address.bucket, **arguments)

    def checked_call(
        self, operation: str, key: str, checks: Mapping[str, Any], **arguments: Any
    ) -> Any:
        """Send one request with checksums; without them to a server that has none.

        Args:
            operation: boto3's name of it.
            key: The object.
            checks: The arguments that are about checksums; in place of those of the same name.
            arguments: The request without them.
        """
        from botocore.exceptions import ClientError

        if not self.checksums:
            return self.call(operation, key, **arguments)
        try:
            return self.call(operation, key, **{**arguments, **checks})
        except ClientError as error:
            if code_of(error) not in _NO_CHECKSUMS and status_of(error) != 501:
                raise
            client = self.client_without_checksums()
            response = getattr(client, operation)(Bucket=self.address.bucket, Key=key, **arguments)
            log.info("%s refuses checksums (%s); none are sent", self.url, code_of(error))
            self.client, self.checksums = client, False
            return response

    def head(self, key: str) -> Found | None:
        """What is known of an object without reading it; None if there is none."""
        from botocore.exceptions import ClientError

        mode = {"ChecksumMode": "ENABLED"} if self.checksums else {}
        try:
            response = self.call("head_object", key, **mode)
        except ClientError as error:
            if missing(error):
                return None
            raise
        metadata = response.get("Metadata", {})
        checked = str(response.get("ChecksumSHA256", ""))
        return Found(
            key=key,
            size_bytes=response["ContentLength"],
            etag=response["ETag"],
            modified_s=response["LastModified"].timestamp(),
            sha256=metadata.get("sha256", ""),
            put=metadata.get("put", ""),
            # `...-2` is a checksum of the checksums of two parts.
            checked="" if "-" in checked else base64.b64decode(checked).hex(),
        )

    def read(self, key: str, limit_bytes: int) -> Content | None:
        """A small object; None if there is none.

        Raises:
            CorruptError: It is longer than `limit_bytes`; not read then.
        """
        from botocore.exceptions import ClientError

        try:
            response = self.call("get_object", key)
        except ClientError as error:
            if missing(error):
                return None
            raise
        with contextlib.closing(response["Body"]) as body:
            if response["ContentLength"] > limit_bytes:
                raise CorruptError(f"{self._where(key)} is longer than {limit_bytes} bytes")
            data = body.read(limit_bytes + 1)
        age_s = server_time_s(response) - response["LastModified"].timestamp()
        return Content(data=data, etag=response["ETag"], age_s=age_s)

    def create(self, key: str, data: bytes | bytearray, sha256: str | None = None) -> bool:
        """Write a small object unless its key is taken; whether this call has created it.

        Args:
            key: Its key.
            data: Its bytes.
            sha256: Of its bytes, for its metadata; for files of a package.
        """
        return self._put(key, data, {"IfNoneMatch": "*"}, sha256)

    def replace(
        self, key: str, data: bytes | bytearray, etag: str, sha256: str | None = None
    ) -> bool:
        """Write a small object in place of the one with this ETag; False if it is not there."""
        return self._put(key, data, {"IfMatch": etag}, sha256)

    def write(self, key: str, data: bytes) -> None:
        """Write a small object, whatever was there."""
        self._put(key, data, {}, None)

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        self.call("delete_object", key)

    def listed(self, prefix: str) -> Iterator[Found]:
        """All objects whose key starts so, sorted by key."""
        for page in self._pages("list_objects_v2", Prefix=prefix):
            for entry in page.get("Contents", ()):
                yield Found(
                    key=entry["Key"],
                    size_bytes=entry["Size"],
                    etag=entry["ETag"],
                    modified_s=entry["LastModified"].timestamp(),
                )

    def folders(self, prefix: str) -> Iterator[str]:
        """What comes between `prefix` and the next `/` of longer keys."""
        for page in self._pages("list_objects_v2", Prefix=prefix, Delimiter="/"):
            for entry in page.get("CommonPrefixes", ()):
                yield entry["Prefix"].removeprefix(prefix).rstrip("/")

    def uploads(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        """Open multipart uploads: key, id, and when each was begun, Unix time."""
        for page in self._pages("list_multipart_uploads", Prefix=prefix):
            for entry in page.get("Uploads", ()):
                yield entry["Key"], entry["UploadId"], entry["Initiated"].timestamp()

    def abort(self, key: str, upload_id: str) -> None:
        """Give up a multipart upload, if it is still open."""
        from botocore.exceptions import ClientError

        try:
            self.call("abort_multipart_upload", key, UploadId=upload_id)
        except ClientError as error:
            if not missing(error):
                raise

    def now_s(self) -> float:
        """The server's clock, Unix time."""
        return server_time_s(self.call("list_objects_v2", Prefix=self.address.root, MaxKeys=1))

    def again_if_raced(self, write: Callable[[], _Result], key: str) -> _Result:
        """Repeat a write as long as another one crosses it (409)."""
        from botocore.exceptions import ClientError

        for number in range(1, _TRIES):
            try:
                return write()
            except ClientError as error:
                if not raced(error):
                    raise
                time.sleep(0.1 * 2**number * secrets.SystemRandom().uniform(0.5, 1))
        try:
            return write()
        except ClientError as error:
            if not raced(error):
                raise
            raise TransientError(
                f"others keep writing {self._where(key)}; run the same command again"
            ) from error

    def _put(
        self,
        key: str,
        data: bytes | bytearray,
        condition: Mapping[str, str],
        sha256: str | None,
    ) -> bool:
        from botocore.exceptions import ClientError

        put = secrets.token_hex(8)
        metadata = {"put": put} if sha256 is None else {"put": put, "sha256": sha256}
        checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        kind = mimetypes.guess_type(key)[0] if sha256 is None else None

        def write() -> bool:
            self.checked_call(
                "put_object",
                key,
                {"ChecksumSHA256": checksum},
                Body=data,
                Metadata=metadata,
                ContentType=kind or "application/octet-stream",
                **condition,
            )
            return True

        try:
            return self.again_if_raced(write, key)
        except ClientError as error:
            if not taken(error) and not (condition.get("IfMatch") and missing(error)):
                raise
        found = self.head(key)
        return found is not None and found.put == put

    def _pages(self, operation: str, **arguments: Any) -> Iterator[Any]:
        paginator = self.client.get_paginator(operation)
        yield from paginator.paginate(Bucket=self.address.bucket, **arguments)

    def _where(self, key: str) -> str:
        return f"s3://{self.address.bucket}/{key}"


def server_time_s(response: Mapping[str, Any]) -> float:
    """When a server sent a response, by its own clock; ours if it does not say."""
    date = response["ResponseMetadata"]["HTTPHeaders"].get("date", "")
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except ValueError:
        return time.time()
