"""Statements about an image, as artifacts that name it as their subject (image-spec 1.1).

One manifest per statement, one layer per file. Where the registry lists referrers, it is asked;
where it does not, an index under the tag `sha256-<hex>` lists them (distribution-spec 1.1,
"Referrers Tag Schema"). Who lists nothing has nothing: what an empty list means is decided above.

Nothing stops two writers from using one name. The older counts, then the smaller digest, and the
other writer is told so, if he still looks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from pipeline.core.errors import ConflictError, CorruptError, NotFoundError, RecipeError
from pipeline.registry.reference import check_part
from pipeline.registry.stores.oci.distribution import Repository
from pipeline.registry.stores.oci.documents import (
    CREATED,
    EMPTY,
    EMPTY_TYPE,
    TITLE,
    Descriptor,
    Document,
    Manifest,
    artifact,
    describe,
    index_document,
    parse_index,
    parse_manifest,
)
from pipeline.registry.stores.oci.tagged import change_tagged

log = logging.getLogger(__name__)

ARTIFACT_TYPE = "application/vnd.enginesmith.statement.v1"
NAME = "io.enginesmith.statement.name"
MAX_STATEMENT_BYTES = 64 << 20
_FILE_TYPE = "application/octet-stream"
_MAX_STATEMENTS = 1000


@dataclass(frozen=True, kw_only=True)
class Referrer:
    """One statement in a registry.

    Attributes:
        name: Of the statement.
        made_s: When its writer says that it was written, Unix time.
        descriptor: Names its manifest.
        files: File name -> blob.
    """

    name: str
    made_s: float
    descriptor: Descriptor
    files: Mapping[str, Descriptor]

    def same_files(self, other: Referrer) -> bool:
        """Whether both hold the same bytes."""
        digests = {name: blob.digest for name, blob in self.files.items()}
        return digests == {name: blob.digest for name, blob in other.files.items()}


def list_referrers(repository: Repository, subject: str) -> list[Referrer]:
    """The statements about an image, one for each name, newest first.

    What is not a statement of ours, or cannot be read, is left out.

    Args:
        repository: Where the image is.
        subject: Digest of the image manifest.
    """
    found: dict[str, Referrer] = {}
    listed = [one for one in _listed(repository, subject) if _may_be_ours(one)]
    for descriptor in listed[:_MAX_STATEMENTS]:
        try:
            referrer = _read(repository, descriptor, subject)
        except (CorruptError, NotFoundError, RecipeError) as error:
            log.warning("A statement about %s@%s is left out: %s", repository, subject, error)
            continue
        held = found.get(referrer.name)
        if held is None or _rank(referrer) < _rank(held):
            found[referrer.name] = referrer
    return sorted(found.values(), key=lambda one: (one.made_s, one.name), reverse=True)


def put_referrers(
    repository: Repository,
    subject: Descriptor,
    statements: Mapping[str, Mapping[str, bytes]],
) -> list[Referrer]:
    """Add statements about an image; one whose name is taken stays as it is.

    Args:
        repository: Where the image is.
        subject: The image manifest.
        statements: Name -> file name -> content.

    Returns:
        What is there now under each of these names.

    Raises:
        TransientError: Others keep overwriting the list of referrers.
    """
    there = {one.name: one for one in list_referrers(repository, subject.digest)}
    added = [
        _push(repository, subject, name, files)
        for name, files in sorted(statements.items())
        if name not in there
    ]
    if unlisted := [one for one, listed in added if not listed]:
        _list_under_tag(repository, subject.digest, unlisted)
    if added:
        there = {one.name: one for one in list_referrers(repository, subject.digest)}
    if missing := statements.keys() - there.keys():
        raise ConflictError(
            f"{repository} took the statement {min(missing)} and does not list it; "
            "run the same command again"
        )
    return [there[name] for name in statements]


def put_referrer(
    repository: Repository, subject: Descriptor, name: str, files: Mapping[str, bytes]
) -> bool:
    """Add one statement. False if the same bytes were there.

    Raises:
        ConflictError: Other bytes are there under its name.
    """
    before = {one.name for one in list_referrers(repository, subject.digest)}
    (there,) = put_referrers(repository, subject, {name: files})
    wanted = Referrer(
        name=name,
        made_s=0.0,
        descriptor=subject,
        files={file: _blob(file, data) for file, data in files.items()},
    )
    if not there.same_files(wanted):
        raise ConflictError(
            f"{repository} holds other bytes under {name}; statements are only ever added, so give "
            "this one another name"
        )
    return name not in before


def read_referrer(repository: Repository, referrer: Referrer) -> dict[str, bytes]:
    """All files of a statement, checked against its manifest.

    Raises:
        CorruptError: One has other bytes, or all together are larger than a statement may be.
    """
    if sum(blob.size_bytes for blob in referrer.files.values()) > MAX_STATEMENT_BYTES:
        raise CorruptError(f"statement {referrer.name} is larger than {MAX_STATEMENT_BYTES} bytes")
    return {
        name: repository.blob(blob, MAX_STATEMENT_BYTES) for name, blob in referrer.files.items()
    }


def delete_referrers(repository: Repository, subject: str) -> int:
    """Remove all statements about an image. Returns the bytes that nobody needs any more."""
    freed = 0
    for referrer in list_referrers(repository, subject):
        freed += sum(blob.size_bytes for blob in referrer.files.values())
        repository.delete_manifest(referrer.descriptor.digest)
    index = repository.manifest(_tag(subject))
    if index is not None:
        repository.delete_manifest(index.digest)
    return freed


def _listed(repository: Repository, subject: str) -> list[Descriptor]:
    """What either list names: a registry may have got the API after the tag was written."""
    native = repository.referrers(subject) or ()
    index = repository.manifest(_tag(subject))
    tagged = parse_index(index.data, f"{repository}:{_tag(subject)}") if index else ()
    return list({one.digest: one for one in (*native, *tagged)}.values())


def _may_be_ours(descriptor: Descriptor) -> bool:
    # Some registries leave the type out of the list: then the manifest itself tells.
    return descriptor.artifact_type in {"", ARTIFACT_TYPE}


def _read(repository: Repository, descriptor: Descriptor, subject: str) -> Referrer:
    origin = f"{repository}@{descriptor.digest}"
    document = repository.manifest(descriptor.digest)
    if document is None:
        raise NotFoundError(f"{origin} is listed and not there")
    manifest = parse_manifest(document, origin)
    about = manifest.subject.digest if manifest.subject else ""
    if manifest.artifact_type != ARTIFACT_TYPE or about != subject:
        raise CorruptError(f"{origin} is of type {manifest.artifact_type!r}, about {about!r}")
    files = {check_part("statement", blob.title): blob for blob in manifest.layers}
    if len(files) != len(manifest.layers):
        raise CorruptError(f"{origin} has a file twice")
    try:
        name = check_part("statement", manifest.annotations[NAME])
        made_s = datetime.fromisoformat(manifest.annotations[CREATED]).timestamp()
    except (KeyError, ValueError, OverflowError) as error:
        raise CorruptError(f"{origin} lacks the annotations of a statement: {error!r}") from error
    return Referrer(
        name=name, made_s=made_s, descriptor=document.descriptor(ARTIFACT_TYPE), files=files
    )


def _rank(referrer: Referrer) -> tuple[float, str]:
    return referrer.made_s, referrer.descriptor.digest


def _blob(name: str, data: bytes) -> Descriptor:
    return describe(data, _FILE_TYPE, **{TITLE: name})


def _push(
    repository: Repository, subject: Descriptor, name: str, files: Mapping[str, bytes]
) -> tuple[Descriptor, bool]:
    """Upload one statement; also says whether the registry lists it by itself."""
    check_part("statement", name)
    if not files:
        raise ValueError(f"statement {name} has no files")
    repository.put_blob(EMPTY, EMPTY_TYPE)
    layers = tuple(
        repository.put_blob(data, _FILE_TYPE, **{TITLE: check_part("statement", file)})
        for file, data in sorted(files.items())
    )
    made = datetime.fromtimestamp(time.time(), UTC).isoformat()
    manifest: Manifest = artifact(ARTIFACT_TYPE, layers, {NAME: name, CREATED: made}, subject)
    document = manifest.document()
    reply = repository.put_manifest(document.digest, document)
    return document.descriptor(ARTIFACT_TYPE), "OCI-Subject" in reply.headers


def _list_under_tag(repository: Repository, subject: str, added: list[Descriptor]) -> None:
    def change(document: Document | None) -> Document | None:
        there = () if document is None else parse_index(document.data, f"{repository}")
        digests = {one.digest for one in there}
        missing = [one for one in added if one.digest not in digests]
        return index_document((*there, *missing)) if missing else None

    change_tagged(repository, _tag(subject), change)


def _tag(digest: str) -> str:
    return digest.replace(":", "-", 1)
