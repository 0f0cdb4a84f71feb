"""A package as a valid image: which tar layers it has, and where each file's bytes lie in them.

Everything here follows from `manifest.json` alone, so a reader computes the place of a file and
trusts no index:

    layer 0        models/, models/manifest.json, then every small file
    layer 1, ...   one large file each (several, where a package has more than MAX_LARGE_LAYERS)

Each layer repeats the folders that lead to its files: engines unpack layers one by one and would
make up the mode of a folder that is not there. An annotation repeats `manifest.json`, so that one
request fetches it. Equal packages are equal images: statements are not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import rfc8785

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.values import FileDigest
from pipeline.registry.manifest import MANIFEST, digest_bytes
from pipeline.registry.paths import folders_of
from pipeline.registry.store import Place
from pipeline.registry.stores.oci.documents import (
    CREATED,
    MAX_DOCUMENT_BYTES,
    TITLE,
    Descriptor,
    Document,
    Manifest,
    describe,
    parse_manifest,
)
from pipeline.registry.stores.oci.tar import END, file_header, folder_header
from pipeline.registry.stores.oci.tar import padding_bytes as tar_padding

ARTIFACT_TYPE = "application/vnd.enginesmith.package.v1"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
ROOT = "models"
LARGE_BYTES = 8 << 20
"""From this size on a file has a layer of its own."""
MAX_LARGE_LAYERS = 100
"""Docker's overlay2 stacks at most 128 layers (docker/docker 20.10, `overlay2.maxDepth`); this
leaves some to an image that is built on ours."""

_MANIFEST = "io.enginesmith.package.manifest"
_EPOCH = "1970-01-01T00:00:00Z"


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file in a tar.

    Attributes:
        file: Path below `/models`, size, SHA-256.
        header: What precedes its bytes: entries of folders, its own.
        offset: Of its first byte in the tar.
    """

    file: FileDigest
    header: bytes
    offset: int


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A tar of some files, as a plan."""

    members: tuple[Member, ...]

    @property
    def size_bytes(self) -> int:
        """Of the whole tar."""
        last = self.members[-1]
        end = last.offset + last.file.size_bytes
        return end + tar_padding(last.file.size_bytes) + len(END)


@dataclass(frozen=True, kw_only=True)
class Image:
    """What an image manifest says of a package; nothing of it is proven.

    Attributes:
        document: Its bytes.
        layers: Names the tars.
        manifest: What it says the bytes of `manifest.json` are.
    """

    document: Document
    layers: tuple[Descriptor, ...]
    manifest: bytes


def plan_layers(manifest: bytes, files: Sequence[FileDigest]) -> tuple[Layer, ...]:
    """The layers of a package.

    Args:
        manifest: The bytes of `manifest.json`.
        files: Those that it lists.
    """
    own = FileDigest(path=MANIFEST, size_bytes=len(manifest), sha256=digest_bytes(manifest))
    small = [file for file in files if file.size_bytes < LARGE_BYTES]
    large = [file for file in files if file.size_bytes >= LARGE_BYTES]
    each = -(-len(large) // MAX_LARGE_LAYERS) or 1
    groups = [large[start : start + each] for start in range(0, len(large), each)]
    return tuple(plan_layer(group) for group in ([own, *small], *groups))


def plan_layer(files: Sequence[FileDigest]) -> Layer:
    """One tar of these files, in this order."""
    members: list[Member] = []
    folders: set[str] = set()
    position = 0
    for file in files:
        path = f"{ROOT}/{file.path}"
        new = [folder for folder in folders_of(path) if folder not in folders]
        folders.update(new)
        header = b"".join(map(folder_header, new)) + file_header(path, file.size_bytes)
        position += len(header)
        members.append(Member(file=file, header=header, offset=position))
        position += file.size_bytes + tar_padding(file.size_bytes)
    return Layer(members=tuple(members))


def image_config(layers: Sequence[Descriptor]) -> bytes:
    """The image config; uncompressed layers, so their digests are the diff ids.

    `architecture` is that of every card that we know; runtimes refuse to mount an image that is
    for another one, whatever it holds.
    """
    value: dict[str, Any] = {
        "architecture": "amd64",
        "os": "linux",
        "created": _EPOCH,
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
        "history": [{"created": _EPOCH, "created_by": "enginesmith"} for _ in layers],
    }
    return rfc8785.dumps(value)


def make_image(
    place: Place, manifest: bytes, config: bytes, layers: Sequence[Descriptor]
) -> Document:
    """The image manifest.

    Raises:
        PipelineError: It lists more files than an image can.
    """
    document = Manifest(
        artifact_type=ARTIFACT_TYPE,
        config=describe(config, CONFIG_TYPE),
        layers=tuple(layers),
        subject=None,
        annotations={
            TITLE: str(place),
            CREATED: _EPOCH,
            _MANIFEST: manifest.decode(),
        },
    ).document()
    if len(document.data) > MAX_DOCUMENT_BYTES:
        raise PipelineError(
            f"{place} has too many files for an OCI registry, whose manifests have at most "
            f"{MAX_DOCUMENT_BYTES} bytes; publish it to a folder or to S3"
        )
    return document


def layer_descriptor(digest: str, size_bytes: int) -> Descriptor:
    """Names one tar."""
    return Descriptor(media_type=LAYER_TYPE, digest=digest, size_bytes=size_bytes)


def parse_image(document: Document, origin: str) -> Image:
    """Read an image manifest.

    Raises:
        CorruptError: It is not of a package.
    """
    manifest = parse_manifest(document, origin)
    stated = manifest.annotations.get(_MANIFEST, "")
    if manifest.artifact_type != ARTIFACT_TYPE or not manifest.layers or not stated:
        raise CorruptError(f"{origin} is not a package of this program; remove that tag")
    return Image(document=document, layers=manifest.layers, manifest=stated.encode())
