"""The order in which a package becomes visible in a tree of objects.

    1. lease       `<version>.lease`, dated by the store: gc leaves the version alone
    2. statements  attachments first, then the envelope, which is what counts
    3. files       hashed on their way, size and checksum asked back from the store; one that is
                   there whole is skipped
    4. manifest    created exclusively: from here on the version is there for ever
    5. the lease goes

A version carries the digest of its manifest, so two publishers of one version send the same bytes
and need not know of each other. A run that was killed anywhere leaves what no reader counts; the
same call goes on there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.errors import ConflictError, CorruptError, TransientError
from pipeline.core.values import FileDigest, Package
from pipeline.registry.manifest import (
    MAX_MANIFEST_BYTES,
    digest_bytes,
    files_of,
    manifest_bytes,
)
from pipeline.registry.reference import reference_of
from pipeline.registry.store import (
    ENVELOPE,
    MAX_ATTACHMENT_BYTES,
    MAX_ENVELOPE_BYTES,
    OnBytes,
    Place,
    RawStatement,
    is_attachment_name,
    is_statement_name,
)
from pipeline.registry.stores.layout import lease_key, manifest_key, statements_key, version_key
from pipeline.registry.stores.objects import Objects, in_parallel

_SMALL_BYTES = 8 << 20
"""Files up to here are sent side by side; a larger one is sent in parts side by side."""


def put_package(
    objects: Objects, package: Package, statements: Sequence[RawStatement], on_bytes: OnBytes
) -> bool:
    """See `pipeline.registry.store.WritableStore.put_package`."""
    place = Place.of(reference_of(package))
    data = sealed_manifest(package)
    if _published(objects, place, data):
        return False
    objects.replace(lease_key(place), b"published")
    for statement in statements:
        put_statement(objects, place, statement)
    files = files_of(package.manifest)
    send = functools.partial(_send, objects, place, package.dir, on_bytes)
    for _ in in_parallel(send, [file for file in files if file.size_bytes <= _SMALL_BYTES]):
        pass
    for file in files:
        if file.size_bytes > _SMALL_BYTES:
            send(file)
    created = objects.create(manifest_key(place), data)
    if not _published(objects, place, data):
        raise TransientError(f"{place} was removed while it was published; publish it again")
    objects.delete([lease_key(place)])
    return created


def sealed_manifest(package: Package) -> bytes:
    """The bytes of a package's manifest.

    Raises:
        CorruptError: They do not have its digest.
    """
    data = manifest_bytes(package.manifest)
    if digest_bytes(data) != package.digest:
        raise CorruptError(f"{package.dir} does not have the digest {package.digest}; get it again")
    return data


def put_statement(objects: Objects, place: Place, statement: RawStatement) -> bool:
    """Make a statement visible, attachments first; whether this call has created it.

    Raises:
        ConflictError: Another envelope lies under its name.
    """
    check_statement(statement)
    prefix = f"{statements_key(place)}{statement.name}/"
    there = objects.read(f"{prefix}{ENVELOPE}", MAX_ENVELOPE_BYTES)
    for file, data in statement.files.items():
        if file != ENVELOPE and (there is None or objects.find(f"{prefix}{file}") is None):
            objects.replace(f"{prefix}{file}", data)
    if there is None and objects.create(f"{prefix}{ENVELOPE}", statement.envelope):
        return True
    if (there or objects.read(f"{prefix}{ENVELOPE}", MAX_ENVELOPE_BYTES)) != statement.envelope:
        raise ConflictError(
            f"{objects.url}: another file lies under statement {statement.name} of {place}, and "
            "statements are only ever added; sign this one again, which gives it another name"
        )
    return False


def check_statement(statement: RawStatement) -> None:
    """Stop a statement that no store takes: a mistake of the program.

    Raises:
        ValueError: Its name, a file's name or a size.
    """
    attachments = {file: data for file, data in statement.files.items() if file != ENVELOPE}
    if not is_statement_name(statement.name) or not all(map(is_attachment_name, attachments)):
        raise ValueError(f"statement {statement.name!r} with files {sorted(attachments)}")
    largest = max(map(len, attachments.values()), default=0)
    if len(statement.envelope) > MAX_ENVELOPE_BYTES or largest > MAX_ATTACHMENT_BYTES:
        raise ValueError(f"statement {statement.name} is too large")


def _send(
    objects: Objects, place: Place, folder: Path, on_bytes: OnBytes, file: FileDigest
) -> None:
    key, source = f"{version_key(place)}/{file.path}", folder / file.path
    if objects.holds(key, source, file):
        on_bytes(file.size_bytes)
    else:
        objects.put_file(key, source, file, on_bytes)


def _published(objects: Objects, place: Place, data: bytes) -> bool:
    """Whether exactly these bytes are the version's manifest; False if it has none."""
    try:
        there = objects.read(manifest_key(place), MAX_MANIFEST_BYTES)
    except CorruptError:
        there = b""
    if there is not None:
        require_same_manifest(there, data, objects.url, place)
    return there is not None


def require_same_manifest(there: bytes, data: bytes, url: str, place: Place) -> None:
    """Stop if another manifest lies under a version.

    Raises:
        ConflictError: It is another one.
    """
    if there != data:
        raise ConflictError(
            f"{url}: another manifest lies under {place}, whose name follows from its own; "
            "who may write there put it in the wrong place: remove it, and publish again"
        )
