"""The store itself: its settings, and each method of the Protocol in a few lines."""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.core.errors import (
    AccessError,
    ConflictError,
    CorruptError,
    NotFoundError,
    RecipeError,
)
from pipeline.core.settings import STRICT
from pipeline.core.values import FileDigest, Package
from pipeline.registry.manifest import MANIFEST, MAX_MANIFEST_BYTES
from pipeline.registry.reference import Part, check_part
from pipeline.registry.stores.s3 import publish, reading, removal, statements
from pipeline.registry.stores.s3.address import check_endpoint, parse_address
from pipeline.registry.stores.s3.bucket import Bucket
from pipeline.registry.stores.s3.connection import Checksums, Connection
from pipeline.registry.stores.store import Place, StoredStatement

log = logging.getLogger(__name__)

_MAX_POINTER_BYTES = 64 << 10
_READERS = 8


@dataclass(frozen=True, kw_only=True, config=STRICT)
class S3Store:
    """`pipeline.registry.stores.store.WritableStore`, in a bucket.

    Attributes:
        url: `s3://BUCKET[/PREFIX]`.
        endpoint_url: Of a server that is not Amazon's; None for what boto3 finds, such as
            `AWS_ENDPOINT_URL_S3`.
        region: None for what boto3 finds, such as `AWS_REGION`.
        request_checksum_calculation: `when_required` sends no checksums, for servers that choke on
            them; None for what boto3 finds, such as `AWS_REQUEST_CHECKSUM_CALCULATION`.
        public: Whether everybody can read the bucket. Then it is read without credentials, if there
            are none.
        part_bytes: Size of the parts of a large file; 5 MiB is the least that S3 takes (Amazon S3
            User Guide, "Multipart upload limits").
    """

    url: str
    endpoint_url: str | None = None
    region: str | None = None
    request_checksum_calculation: Checksums | None = None
    public: bool = False
    part_bytes: Annotated[int, Field(ge=5 << 20, le=32 << 20)] = 8 << 20

    def __post_init__(self) -> None:
        parse_address(self.url)
        if self.endpoint_url is not None:
            check_endpoint(self.endpoint_url)

    @property
    def local(self) -> bool:
        return False

    def names(self) -> list[str]:
        with self._asking("list") as bucket:
            return _valid("name", bucket.folders(bucket.address.root))

    def variants(self, name: str) -> list[str]:
        with self._asking("list") as bucket:
            prefix = f"{bucket.address.root}{check_part('name', name)}/"
            return _valid("variant", bucket.folders(prefix))

    def versions(self, name: str, variant: str) -> list[str]:
        with self._asking("list") as bucket:
            prefix = bucket.address.variant(name, variant)
            paths = (found.key.removeprefix(prefix) for found in bucket.listed(prefix))
            end = f"/{MANIFEST}"
            complete = (path.removesuffix(end) for path in paths if path.endswith(end))
            return _valid("version", complete)

    def read_manifest(self, place: Place) -> bytes:
        with self._asking("read") as bucket:
            content = bucket.read(bucket.address.manifest(place), MAX_MANIFEST_BYTES)
            if content is None:
                raise NotFoundError(f"{self.url} has no {place}")
            return content.data

    @contextlib.contextmanager
    def open_file(
        self, place: Place, file: FileDigest, offset: int = 0, end: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        """See the Protocol. Costs no request of its own; any number of threads may read at once."""
        bucket = self._bucket()
        key = f"{bucket.address.version(place)}/{file.path}"
        chunks = reading.read_from(bucket, key, offset, end)
        with contextlib.closing(chunks), bucket.errors(f"read {file.path} of {place} in"):
            yield chunks

    def statements(self, place: Place) -> list[StoredStatement]:
        with self._asking("read") as bucket:
            return statements.list_statements(bucket, place)

    def read_statement(self, place: Place, name: str) -> dict[str, bytes]:
        with self._asking("read") as bucket:
            return statements.read_statement(bucket, place, name)

    def channels(self, name: str, variant: str) -> dict[str, bytes]:
        with self._asking("read") as bucket:
            return _small_files(bucket, bucket.address.channels(name, variant))

    def moves(self, name: str, variant: str) -> dict[str, bytes]:
        with self._asking("read") as bucket:
            return _small_files(bucket, f"{bucket.address.channels(name, variant)}log/")

    def check_writable(self) -> None:
        """See the Protocol. Writes and removes an object, to see that `If-None-Match` works."""
        with self._asking("publish to") as bucket:
            key = f"{bucket.address.root}{removal.PROBE}{secrets.token_hex(8)}"
            bucket.create(key, b"1")
            exclusive = not bucket.create(key, b"2")
            try:
                with self._asking("remove a test object from"):
                    bucket.delete(key)
            except AccessError as error:  # write-only credentials are enough to publish
                log.info("%s; left %s there", error, key)
            if not exclusive:
                raise AccessError(
                    f"cannot publish to {self.url}: this server ignores If-None-Match, so two "
                    "publishers could overwrite each other; upgrade it, or use another registry"
                )

    def put_package(
        self,
        package: Package,
        statements: Mapping[str, Mapping[str, bytes]],
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> bool:
        """See the Protocol, and `pipeline.registry.stores.s3.publish` for the order of things."""
        with self._asking("publish to") as bucket:
            return publish.put_package(bucket, package, statements, on_bytes, self.part_bytes)

    def put_statement(self, place: Place, name: str, files: Mapping[str, bytes]) -> bool:
        """See the Protocol, and `pipeline.registry.stores.s3.statements` for how it lies there."""
        with self._asking("write to") as bucket:
            if bucket.head(bucket.address.manifest(place)) is None:
                raise NotFoundError(f"{self.url} has no {place}; publish it first")
            if statements.put_statement(bucket, place, name, files):
                return True
            statements.require_same(bucket, place, name, files)
            return False

    def put_move(self, name: str, variant: str, file: str, data: bytes) -> None:
        with self._asking("write to") as bucket:
            folder = f"{bucket.address.channels(name, variant)}log/"
            if not bucket.create(f"{folder}{check_part('statement', file)}", data):
                raise ConflictError(
                    f"{self.url}: {folder}{file} exists; somebody else moved this channel meanwhile"
                )

    def put_channel(self, name: str, variant: str, file: str, data: bytes) -> None:
        with self._asking("write to") as bucket:
            folder = bucket.address.channels(name, variant)
            bucket.write(f"{folder}{check_part('statement', file)}", data)

    def delete_version(self, place: Place) -> int:
        with self._asking("remove from") as bucket:
            return removal.delete_version(bucket, place)

    def now_s(self) -> float:
        with self._asking("read the clock of") as bucket:
            return bucket.now_s()

    def leftovers(self, min_age_s: float, *, delete: bool) -> list[str]:
        with self._asking("clean") as bucket:
            return removal.leftovers(bucket, min_age_s, delete=delete)

    @contextlib.contextmanager
    def _asking(self, doing: str) -> Iterator[Bucket]:
        bucket = self._bucket()
        with bucket.errors(doing):
            yield bucket

    def _bucket(self) -> Bucket:
        return self._connection.bucket()

    @functools.cached_property
    def _connection(self) -> Connection:
        return Connection(
            url=self.url,
            endpoint_url=self.endpoint_url,
            region=self.region,
            checksums=self.request_checksum_calculation,
            public=self.public,
        )


def _valid(part: Part, texts: Iterator[str]) -> list[str]:
    """Sorted, those that are a valid `part`; what else lies there is not ours."""
    found = set()
    for text in texts:
        with contextlib.suppress(RecipeError):
            found.add(check_part(part, text))
    return sorted(found)


def _small_files(bucket: Bucket, folder: str) -> dict[str, bytes]:
    """File name -> content of the JSON files right below `folder`; too long ones are no channel."""
    names = [
        found.key.removeprefix(folder)
        for found in bucket.listed(folder)
        if found.size_bytes <= _MAX_POINTER_BYTES
    ]
    names = [name for name in names if name.endswith(".json") and "/" not in name]

    def read(name: str) -> bytes | None:
        with contextlib.suppress(CorruptError):  # it grew
            content = bucket.read(f"{folder}{name}", _MAX_POINTER_BYTES)
            return None if content is None else content.data
        return None

    with ThreadPoolExecutor(_READERS) as pool:
        contents = list(pool.map(read, names))
    return {name: data for name, data in zip(names, contents, strict=True) if data is not None}


KIND = S3Store
