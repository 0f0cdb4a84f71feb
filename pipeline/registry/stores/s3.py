"""A registry in a bucket; endpoint, region and credentials are found as by all that uses boto3.

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
import mimetypes
import os
import re
import secrets
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pydantic.dataclasses

from pipeline.core.errors import (
    AccessError,
    CorruptError,
    Fault,
    NotFoundError,
    PipelineError,
    RecipeError,
    TransientError,
)
from pipeline.core.patience import Patience
from pipeline.core.published import FileDigest
from pipeline.core.settings import STRICT
from pipeline.registry.store import OnBytes, in_parallel
from pipeline.registry.stores import transfer
from pipeline.registry.stores.tree import Found, TreeStore

if TYPE_CHECKING:
    from pipeline.registry.stores.publication import WritableStore

# Amazon S3 User Guide, "General purpose bucket naming rules"; access point ARNs are not taken.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
_THREADS = 8
PART_BYTES = 8 << 20  # of a large file; more where that were too many
_MAX_PARTS = 9_000  # S3 takes 10,000 (Amazon S3 User Guide, "Multipart upload limits")
_PROBE = ".writable"

_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)"
_ADVICE: tuple[tuple[str, type[PipelineError], str], ...] = (
    ("NoSuchBucket", NotFoundError, "there is no such bucket: check the URL and the endpoint"),
    ("RequestTimeTooSkewed", AccessError, "this machine's clock is wrong: set it, as with NTP"),
    (
        "ExpiredToken|TokenRefreshRequired|InvalidToken|RequestExpired",
        AccessError,
        "the credentials have expired: log in again",
    ),
    ("InvalidAccessKeyId|SignatureDoesNotMatch|NotSignedUp", AccessError, f"check {_CREDENTIALS}"),
    (
        "PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraintException",
        PipelineError,
        "set AWS_REGION to the region of the bucket",
    ),
    (
        "RequestTimeout|Throttling.*|TooManyRequests|OperationAborted"
        "|BadDigest|IncompleteBody|XAmzContentSHA256Mismatch",  # damaged on their way
        TransientError,
        "try again later",
    ),
    (
        "(NoCredentials|PartialCredentials|.*Retrieval|SSO.*|UnauthorizedSSOToken|ConfigParse)Error"
        "|ProfileNotFound|ConfigNotFound",
        AccessError,
        f"there are no credentials: log in, or set {_CREDENTIALS}",
    ),
    (
        "SSLError",
        PipelineError,
        "the server's certificate is not trusted: name the file of your authority in AWS_CA_BUNDLE",
    ),
    (
        "ResponseParserError",
        CorruptError,
        "what answers is no S3 server: check the endpoint, and whether the network wants a login",
    ),
)
"""Codes of a server (Amazon S3 API Reference, "Error responses") and exceptions of botocore, as a
pattern; error; advice."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class S3Registry:
    """A registry in a bucket, as a recipe names it.

    Endpoint, region, credentials and whether checksums are sent come from where boto3 finds them:
    `AWS_ENDPOINT_URL_S3`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, and `AWS_REQUEST_CHECKSUM_CALCULATION`
    (`when_required` for servers that refuse checksums; then what was sent is read back).
    """

    url: str  # `s3://BUCKET[/PREFIX]`
    public: bool = False  # whether anyone can read the bucket

    def __post_init__(self) -> None:
        parse_address(self.url)

    def reader(self) -> TreeStore:
        return TreeStore(objects=self._objects(), public=self.public)

    def store(self) -> WritableStore:
        from pipeline.registry.stores.publication import WritableTree

        return WritableTree(objects=self._objects(), public=self.public)

    def _objects(self) -> S3Objects:
        bucket, root = parse_address(self.url)
        return S3Objects(url=self.url, bucket=bucket, root=root)


def parse_address(url: str) -> tuple[str, str]:
    """Bucket, and what our keys in it start with, of `s3://BUCKET[/PREFIX]`, or a RecipeError."""
    parts = urlsplit(url)
    prefix = parts.path.strip("/")
    wrong = [
        part
        for part in (prefix.split("/") if prefix else ())
        if not _SEGMENT.fullmatch(part) or part in {".", ".."}
    ]
    fault = ""
    if parts.scheme != "s3" or parts.query or parts.fragment:
        fault = f"{url!r} is not an S3 registry; write s3://BUCKET/PREFIX"
    elif "@" in parts.netloc:
        fault = "an S3 URL holds no credentials; put them into AWS_ACCESS_KEY_ID and so on"
    elif not _BUCKET.fullmatch(parts.netloc):
        fault = f"{url!r} names no bucket: 3 to 63 lowercase letters, digits, dots, dashes"
    elif wrong:
        fault = f"{wrong[0]!r} may not be in a prefix: letters, digits, dots, dashes, underscores"
    if fault:
        raise RecipeError([Fault("registry", fault)])
    return parts.netloc, f"{prefix}/" if prefix else ""


@dataclass(frozen=True, kw_only=True)
class S3Objects:
    """`WritableObjects` of `pipeline.registry.stores.publication`, in a bucket.

    `root` is what all our keys start with: empty, or it ends in `/`.
    """

    url: str
    bucket: str
    root: str
    _clients: dict[int, Any] = field(default_factory=dict)
    """Of each process: two processes that read one socket mix up replies."""
    _locks: dict[int, threading.Lock] = field(default_factory=dict)
    """The same: the parent may have held its own while it forked."""
    _patience: Patience = field(default_factory=Patience)

    def listed(self, prefix: str) -> Iterator[Found]:
        with self.errors("list"):
            pages = self.pages("list_objects_v2", Prefix=f"{self.root}{prefix}")
            for entry in transfer.listed(pages, lambda page: page.get("Contents"), self.url):
                key = str(entry.get("Key", "")).removeprefix(self.root)
                yield _found(key, entry.get("Size", -1), entry.get("LastModified"))

    def read(self, key: str, limit_bytes: int) -> bytes | None:
        from botocore.exceptions import HTTPClientError, IncompleteReadError
        from urllib3.exceptions import HTTPError

        broken = HTTPClientError, IncompleteReadError, HTTPError, ConnectionError, TimeoutError
        with self.errors(f"read {key} in"):
            for _ in range(transfer.ATTEMPTS - 1):
                with contextlib.suppress(*broken):
                    return self._read(key, limit_bytes)
            return self._read(key, limit_bytes)

    @contextlib.contextmanager
    def stream(self, key: str, offset: int, end: int | None) -> Iterator[Iterator[bytes]]:
        what = f"{self.url}: {key}"
        with self.errors(f"read {key} in"), contextlib.ExitStack() as stack:
            response = None
            if end is None or end > offset:
                asked = f"bytes={offset}-{'' if end is None else end - 1}"
                response = self._get(key, Range=asked)
            if response is None:
                yield iter(())
                return
            body = stack.enter_context(contextlib.closing(response["Body"]))
            stated = response.get("ContentRange")
            if stated is not None and not str(stated).startswith(f"bytes {offset}-"):
                raise TransientError(f"asked {what} from byte {offset} on, got {stated!r}")
            skip = offset if stated is None else 0  # a server that knows no ranges sends all
            yield transfer.window(self._chunks(body, what), skip, sys.maxsize, what)

    def find(self, key: str) -> Found | None:
        head = self._head(key)
        if head is None:
            return None
        # -1, which no file has, where the server does not tell.
        return _found(key, head.get("ContentLength", -1), head.get("LastModified"))

    def create(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        with self.errors(f"write {key} to"):
            try:
                self._put(key, data, IfNoneMatch="*")
            except ClientError as error:
                if _code_and_status(error)[1] != 412:  # else the key is taken
                    raise
                return False
            return True

    def replace(self, key: str, data: bytes) -> None:
        with self.errors(f"write {key} to"):
            self._put(key, data)

    def put_file(self, key: str, source: Path, file: FileDigest, on_bytes: OnBytes) -> None:
        from boto3.s3.transfer import TransferConfig

        from pipeline.registry.stores.publication import checked_chunks

        part_bytes = max(PART_BYTES, -(-file.size_bytes // _MAX_PARTS))
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
            reader = _Hashing(chunks=checked_chunks(source, file, part_bytes))
            with self._patience.waiting(), _readable():
                self.client().upload_fileobj(
                    reader, Bucket=self.bucket, Key=f"{self.root}{key}", ExtraArgs=extra,
                    Config=config, Callback=on_bytes,
                )  # fmt: skip
        if not self._is_sent(key, file, reader.crc):
            advice = "nothing shows yet: look after the store, then run the same command again"
            raise CorruptError(f"{self.url}: {key} is not there as it was sent; {advice}")

    def _is_sent(self, key: str, file: FileDigest, crc: int) -> bool:
        """Whether what we sent is there: by the server's checksum, where it has one."""
        from pipeline.registry.stores.publication import holds

        head = self._head(key)
        if head is None or head.get("ContentLength") != file.size_bytes:
            return False
        text = head.get("ChecksumCRC32", "")
        # `...-2` is a checksum of the checksums of two parts.
        if text and "-" not in text and head.get("ChecksumType") != "COMPOSITE":
            return bool(text == base64.b64encode(crc.to_bytes(4, "big")).decode())
        return holds(self, key, file)

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
            pages = self.pages("list_multipart_uploads", Prefix=self.root)
            for entry in transfer.listed(pages, lambda page: page.get("Uploads"), self.url):
                key = str(entry.get("Key", "")).removeprefix(self.root)
                begun = entry.get("Initiated")
                if begun is not None and begun.timestamp() <= newest_s:
                    if delete:
                        upload = str(entry.get("UploadId"))
                        self._call_if_there("abort_multipart_upload", key, UploadId=upload)
                    yield f"{key} (unfinished upload)"

    def check_writable(self) -> None:
        if self.create(_PROBE, b"1") and self.create(_PROBE, b"1"):  # it stays
            fault = "this server ignores If-None-Match, so a manifest could be overwritten"
            raise AccessError(f"cannot publish to {self.url}: {fault}; use another registry")

    def client(self) -> Any:
        pid = os.getpid()
        with self._locks.setdefault(pid, threading.Lock()):
            if pid not in self._clients:
                self._clients[pid] = self._connect()
        return self._clients[pid]

    def call(self, operation: str, key: str | None = None, **arguments: Any) -> Any:
        if key is not None:
            arguments["Key"] = f"{self.root}{key}"
        send: Callable[..., Any] = getattr(self.client(), operation)
        with self._patience.waiting(), _readable():
            return send(Bucket=self.bucket, **arguments)

    def pages(self, operation: str, **arguments: Any) -> Iterator[Any]:
        paginator = self.client().get_paginator(operation)
        pages = iter(paginator.paginate(Bucket=self.bucket, **arguments))
        while True:
            with self._patience.waiting(), _readable():
                page = next(pages, None)
            if page is None:
                return
            yield page

    def _chunks(self, body: Any, what: str) -> Iterator[bytes]:
        # What has arrived; botocore's own methods wait until a chunk is full.
        return transfer.at_pace(body._raw_stream.read1, what, self._patience)

    @contextlib.contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Turn an exception of botocore, which tried several times, into one of ours."""
        try:
            yield
        except PipelineError:
            raise
        except Exception as error:
            explained = _explained(error, f"cannot {doing} {self.url}")
            if explained is None:
                raise
            raise explained from error

    def _connect(self) -> Any:
        import boto3
        from botocore.awsrequest import AWSHTTPConnection, AWSHTTPSConnection
        from botocore.config import Config
        from botocore.handlers import add_expect_header

        session = boto3.session.Session(botocore_session=_botocore_session())
        config = Config(
            connect_timeout=transfer.CONNECT_S,
            read_timeout=transfer.SILENCE_S,
            retries={"mode": "standard", "total_max_attempts": transfer.ATTEMPTS},
            max_pool_connections=transfer.CONNECTIONS,
            tcp_keepalive=True,
            # Every byte is compared with the manifest's SHA-256.
            response_checksum_validation="when_required",
            # So is every body that goes out, by whoever reads it: HTTP needs no SHA-256 more.
            s3={"payload_signing_enabled": False},
        )
        client = session.client("s3", config=config)
        # botocore waits without end for a server that begins to say `100 Continue` and goes away.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        # botocore has no setting for its connection classes; urllib3's pool manager has.
        manager = client._endpoint.http_session._manager
        manager.pool_classes_by_scheme = transfer.timed_pools(
            AWSHTTPConnection, AWSHTTPSConnection, self._patience
        )
        return client

    def _read(self, key: str, limit_bytes: int) -> bytes | None:
        response = self._get(key)
        if response is None:
            return None
        what = f"{self.url}: {key}"
        with contextlib.closing(response["Body"]) as body:
            return transfer.read_whole(self._chunks(body, what), limit_bytes, what)

    def _get(self, key: str, **arguments: str) -> Any:
        """The response to a GET; None if there is no such object, or no such byte."""
        from botocore.exceptions import ClientError

        try:
            response = self.call("get_object", key, **arguments)
        except ClientError as error:
            code, status = _code_and_status(error)
            if status == 416 or code == "InvalidRange" or (_is_missing(error) and not arguments):
                return None
            raise
        if "ContentLength" not in response:  # then its end could be a connection that broke
            response["Body"].close()
            raise TransientError(f"{self.url}: {key} comes without its size; try again")
        return response

    def _head(self, key: str) -> Any:
        with self.errors(f"read {key} in"):
            return self._call_if_there("head_object", key, ChecksumMode="ENABLED")

    def _call_if_there(self, operation: str, key: str, **arguments: Any) -> Any:
        from botocore.exceptions import ClientError

        try:
            return self.call(operation, key, **arguments)
        except ClientError as error:
            if _is_missing(error):
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
                code, status = _code_and_status(error)
                if status != 409 or code not in {"", "409", "ConditionalRequestConflict"}:
                    raise
                time.sleep(0.1 * 2**attempt * secrets.SystemRandom().uniform(0.5, 1))
        raise TransientError(f"{self.url}: others keep writing {key}; run the same command again")


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """The parser of botocore stumbles over some replies that are none of S3's."""
    from botocore.parsers import ResponseParserError

    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ResponseParserError(f"{type(error).__name__}: {error}") from error


def _botocore_session() -> Any:
    """A session that reads dates as ISO 8601; botocore guesses their form.

    That took half the time of listing 1,000 packages (measured 2026-11-30).
    """
    from botocore.session import Session
    from botocore.utils import parse_timestamp

    def parse(value: Any) -> datetime:
        with contextlib.suppress(TypeError, ValueError):
            return datetime.fromisoformat(value)
        found: datetime = parse_timestamp(value)
        return found

    session = Session()
    factory = session.get_component("response_parser_factory")
    factory.set_parser_defaults(timestamp_parser=parse)
    return session


def _code_and_status(error: Exception) -> tuple[str, int]:
    """Code of a botocore `ClientError`, such as `NoSuchKey`, and HTTP status; 0 if it has none."""
    response: Any = getattr(error, "response", None) or {}
    metadata = response.get("ResponseMetadata", {})
    return str(response.get("Error", {}).get("Code", "")), int(metadata.get("HTTPStatusCode", 0))


def _is_missing(error: Exception) -> bool:
    """Whether the object, not the bucket, is not there; a HEAD tells its status only."""
    code, status = _code_and_status(error)
    known = {"NoSuchKey", "NoSuchVersion", "NoSuchUpload", "404"}
    return code in known or (status == 404 and not code)


def _found(key: str, size_bytes: int, modified: datetime | None) -> Found:
    """An object; one that the server does not date is new, so that nothing removes it."""
    modified_s = time.time() if modified is None else modified.timestamp()
    return Found(key=key, size_bytes=size_bytes, modified_s=modified_s)


def _explained(error: Exception, fault: str) -> PipelineError | None:
    """What to raise instead of an exception; None if it is not of botocore or the network."""
    from botocore import exceptions as botocore
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    of_network = botocore.ConnectionError | botocore.HTTPClientError | botocore.IncompleteReadError
    broken = isinstance(error, of_network | HTTPError | ConnectionError | TimeoutError)
    known = botocore.ClientError | botocore.BotoCoreError | ResponseParserError
    if not broken and not isinstance(error, known):
        return None
    inner = getattr(error, "kwargs", {}).get("error")
    if isinstance(inner, PipelineError):  # of ours, out of botocore
        return inner
    # One line of a terminal.
    text = re.sub(r"[^\x20-\x7e]+", " ", str(error) or type(error).__name__)[:300]
    message, (code, status) = f"{fault}: {text}", _code_and_status(error)
    for pattern, kind, advice in _ADVICE:
        if re.fullmatch(pattern, code or type(error).__name__):
            return kind(f"{message}; {advice}")
    if broken:
        return TransientError(f"{message}; check the endpoint and the network, and try again")
    if not isinstance(error, botocore.ClientError):
        return PipelineError(f"{message}; check the URL, the region and the endpoint")
    if status in {401, 403}:
        return AccessError(
            f"{message}; ask for permission on the bucket, or use other credentials: {_CREDENTIALS}"
        )
    if status == 429 or status >= 500:
        return TransientError(f"{message}; try again later")
    if status == 404 or _is_missing(error):
        return NotFoundError(f"{message}; check the reference")
    return PipelineError(f"{message}; check that the endpoint speaks S3")


@dataclass(kw_only=True)
class _Hashing:
    """What boto3 reads a file from; it raises before the last byte if they are the wrong bytes."""

    chunks: Iterator[bytes]
    crc: int = 0
    _rest: bytes = b""

    def read(self, count: int = sys.maxsize) -> bytes:
        data = self._rest or next(self.chunks, b"")  # a part, as boto3 asks for: not copied
        while len(data) < count and (chunk := next(self.chunks, b"")):
            data += chunk
        data, self._rest = data[:count], data[count:]
        self.crc = zlib.crc32(data, self.crc)
        return data


KIND = S3Registry
