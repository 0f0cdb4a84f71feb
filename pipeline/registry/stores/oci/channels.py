"""A variant's channel pointers and its log of moves: one artifact under `<variant>_channels`.

One layer per file, told apart by media type. Small files travel inside the manifest, too (`data` of
their descriptors, image-spec 1.1), so that reading all of them is one request. How two writers get
along, `tagged` tells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from pipeline.core.errors import ConflictError, CorruptError, RecipeError
from pipeline.registry.reference import check_part
from pipeline.registry.stores.oci.address import channels_tag
from pipeline.registry.stores.oci.distribution import Repository
from pipeline.registry.stores.oci.documents import (
    EMPTY,
    EMPTY_TYPE,
    TITLE,
    Descriptor,
    Document,
    artifact,
    describe,
    parse_manifest,
)
from pipeline.registry.stores.oci.tagged import change_tagged

ARTIFACT_TYPE = "application/vnd.enginesmith.channels.v1"
Kind = Literal["channel", "move"]
_TYPES: dict[Kind, str] = {
    "channel": "application/vnd.enginesmith.channel.v1+json",
    "move": "application/vnd.enginesmith.move.v1+json",
}
_MAX_FILE_BYTES = 64 << 10
_MAX_INLINE_BYTES = 4 << 10
_MAX_ALL_INLINE_BYTES = 1 << 20
"""A manifest has at most 4 MiB; what is left names some ten thousand more files."""


def read_channels(repository: Repository, variant: str, kind: Kind) -> dict[str, bytes]:
    """File name -> content of all channels, or of all moves.

    Raises:
        CorruptError: The artifact, or one of its files, is not what it claims to be.
    """
    document = repository.manifest(channels_tag(variant))
    return {
        name: repository.blob(blob, _MAX_FILE_BYTES)
        for name, blob in _files(repository, variant, document).items()
        if blob.media_type == _TYPES[kind]
    }


def put_channel_file(
    repository: Repository, variant: str, kind: Kind, name: str, data: bytes
) -> None:
    """Write a channel, in place of what was there, or append a move.

    Raises:
        ConflictError: A move of this name is there, with other bytes.
        TransientError: Others keep overwriting it.
    """
    check_part("statement", name)
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"{name} has {len(data)} bytes, at most {_MAX_FILE_BYTES} are read")
    added = describe(data, _TYPES[kind], **{TITLE: name})
    replaced: list[str] = []  # digest of what our first write replaced, empty for nothing

    def change(document: Document | None) -> Document | None:
        files = _files(repository, variant, document)
        held = files[name].digest if name in files else ""
        ours = held == added.digest
        if held and kind == "move" and not (ours and replaced):
            raise ConflictError(f"{repository}: {name} of {variant} is there; read the log again")
        # A channel that is neither ours nor what was there before was set by someone after us.
        if ours or (replaced and held not in {"", *replaced}):
            return None
        if not replaced:
            repository.put_blob(EMPTY, EMPTY_TYPE)
            repository.put_blob(data, _TYPES[kind])
            replaced.append(held)
        return _document(
            [*(one for key, one in files.items() if key != name), _inline(added, data)]
        )

    change_tagged(repository, channels_tag(variant), change)


def _document(files: Iterable[Descriptor]) -> Document:
    budget = _MAX_ALL_INLINE_BYTES
    layers = []
    for file in sorted(files, key=lambda one: one.title):
        inline = file.data if file.data is not None and file.size_bytes <= budget else None
        budget -= len(inline or b"")
        layers.append(dataclasses.replace(file, data=inline))
    return artifact(ARTIFACT_TYPE, tuple(layers), {}).document()


def _inline(file: Descriptor, data: bytes) -> Descriptor:
    return dataclasses.replace(file, data=data) if len(data) <= _MAX_INLINE_BYTES else file


def _files(
    repository: Repository, variant: str, document: Document | None
) -> dict[str, Descriptor]:
    if document is None:
        return {}
    origin = f"{repository}:{channels_tag(variant)}"
    manifest = parse_manifest(document, origin)
    if manifest.artifact_type != ARTIFACT_TYPE:
        raise CorruptError(f"{origin} is of type {manifest.artifact_type!r}; remove that tag")
    try:
        return {
            check_part("statement", blob.title): blob
            for blob in manifest.layers
            if blob.media_type in _TYPES.values()
        }
    except RecipeError as error:
        raise CorruptError(f"{origin} has a file of no use: {error}") from error
