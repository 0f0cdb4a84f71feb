"""Put a package into a bucket, so that it shows whole or not at all.

    1. claim      `<version>.claim`, exclusively: other bytes are refused from here on
    2. files      each exclusively, hashed on its way; what a dead run of other bytes left goes
    3. statements each is one object
    4. manifest   `<version>/manifest.json`, exclusively: from here on the version is there
    5. read back  the manifest's bytes; of every file the size, and its SHA-256: as the server
                  computed it, or, of a multipart upload, whose CRC-32 the server compared, as our
                  upload wrote it down
    6. the claim goes

A run that was stopped anywhere leaves what no reader counts; the next one goes on there.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping

from pipeline.core.errors import ConflictError, CorruptError, PipelineError, TransientError
from pipeline.core.values import FileDigest, Package
from pipeline.registry.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    digest_bytes,
    manifest_bytes,
)
from pipeline.registry.reference import reference_of
from pipeline.registry.stores.s3.bucket import Bucket
from pipeline.registry.stores.s3.claim import Claim
from pipeline.registry.stores.s3.statements import put_statement
from pipeline.registry.stores.s3.upload import Uploader, uploader
from pipeline.registry.stores.store import Place

log = logging.getLogger(__name__)

_ADVICE = "nothing was overwritten; run the same command with --rebuild to publish beside it"


def put_package(
    bucket: Bucket,
    package: Package,
    statements: Mapping[str, Mapping[str, bytes]],
    on_bytes: Callable[[int], None],
    part_bytes: int,
) -> bool:
    """See `pipeline.registry.stores.store.WritableStore.put_package`."""
    place = Place.of(reference_of(package))
    data = manifest_bytes(package.manifest)
    if digest_bytes(data) != package.digest:
        raise CorruptError(f"{package.dir} has not the digest {package.digest}; get it again")
    claim = Claim(bucket=bucket, place=place, digest=package.digest)
    if _published(bucket, place, data):
        claim.clear()  # of a run that was killed after its manifest
        return False
    claim.take()
    try:
        with bucket.errors("publish to"):
            created = _put_claimed(bucket, claim, package, data, statements, on_bytes, part_bytes)
    except BaseException as error:
        # Whoever comes next needs no claim of ours: it compares what lies there. Only a server that
        # did not answer is not asked once more.
        if not isinstance(error, TransientError):
            with contextlib.suppress(Exception):
                claim.release()
        raise
    claim.release()
    return created


def _put_claimed(
    bucket: Bucket,
    claim: Claim,
    package: Package,
    data: bytes,
    statements: Mapping[str, Mapping[str, bytes]],
    on_bytes: Callable[[int], None],
    part_bytes: int,
) -> bool:
    place = claim.place
    if _published(bucket, place, data):  # between our first look and the claim
        return False
    folder = f"{bucket.address.version(place)}/"
    files = {
        f"{folder}{file['path']}": FileDigest(
            path=file["path"], size_bytes=file["size"], sha256=file["sha256"]
        )
        for file in package.manifest["files"]
    }
    if claim.taken_over:
        for key, upload_id, _ in list(bucket.uploads(folder)):
            bucket.abort(key, upload_id)
    for found in list(bucket.listed(folder)):
        if found.key not in files and found.key != f"{folder}{MANIFEST}":
            bucket.delete(found.key)
    with uploader(bucket, part_bytes, claim, on_bytes) as sender:
        for key, file in files.items():
            sender.send(package.dir / file.path, file, key)
        sender.finish()
        for name, contents in statements.items():
            put_statement(bucket, place, name, contents)
        claim.keep(now=True)
        if _published(bucket, place, data):  # by a run with the same bytes
            return False
        _compare(sender, files, "nobody saw it; run the same command again")
        created = bucket.create(bucket.address.manifest(place), data)
        if not _published(bucket, place, data):
            raise PipelineError(f"{place} was removed while it was published; publish it again")
        _compare(sender, files, "somebody else changed it; remove the version and publish again")
    return created


def _published(bucket: Bucket, place: Place, data: bytes) -> bool:
    """Whether exactly these bytes are the version's manifest; False if it has none.

    Raises:
        ConflictError: It has another one.
    """
    key = bucket.address.manifest(place)
    try:
        there = bucket.read(key, MAX_MANIFEST_BYTES)
    except CorruptError as error:
        raise ConflictError(f"{place} is taken by a damaged package ({error}); {_ADVICE}") from (
            error
        )
    if there is None:
        return False
    if there.data != data:
        raise ConflictError(
            f"{place} is already published with other bytes (digest "
            f"{digest_bytes(there.data)[:12]}, these have {digest_bytes(data)[:12]}); {_ADVICE}"
        )
    return True


def _compare(sender: Uploader, files: Mapping[str, FileDigest], advice: str) -> None:
    """Ask the server about every file.

    Raises:
        CorruptError: One is not there, or has other bytes.
    """
    keys = list(files)
    for key, found in zip(keys, sender.pool.map(sender.bucket.head, keys), strict=True):
        if found is None or not sender.right(found, files[key]):
            fault = "is gone" if found is None else "has other bytes than were sent"
            raise CorruptError(f"{sender.bucket.url}: {key} {fault}; {advice}")
