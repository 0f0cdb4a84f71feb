"""What every store checks of a package and of a statement before it takes them."""

from __future__ import annotations

from pipeline.core.errors import ConflictError, CorruptError
from pipeline.core.values import Package
from pipeline.registry.manifest import digest_bytes, manifest_bytes
from pipeline.registry.store import (
    ENVELOPE,
    MAX_ATTACHMENT_BYTES,
    MAX_ENVELOPE_BYTES,
    Place,
    RawStatement,
    is_attachment_name,
    is_statement_name,
)


def sealed_manifest(package: Package) -> bytes:
    """The bytes of a package's manifest.

    Raises:
        CorruptError: They do not have its digest.
    """
    data = manifest_bytes(package.manifest)
    if digest_bytes(data) != package.digest:
        raise CorruptError(f"{package.dir} does not have the digest {package.digest}; get it again")
    return data


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
