"""A package as a valid image: which tar layers it has, and where each file's bytes lie in them.

Everything here follows from `manifest.json` alone, so a reader computes the place of a file and
trusts no index:

    layer 0        models/, models/manifest.json, then every small file
    layer 1, ...   one large file each (several, where a package has more than MAX_LARGE_LAYERS)
    last layer     models/engine/model.sig, if the package was signed; no part of the package

Each layer repeats the folders that lead to its files: engines unpack layers one by one and would
make up the mode of a folder that is not there. `manifest.json` is always at MANIFEST_OFFSET of
layer 0 and its size is an annotation, so one ranged request fetches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rfc8785

from pipeline.core.errors import CorruptError
from pipeline.core.values import FileDigest
from pipeline.registry.manifest import ENGINE, MANIFEST, MAX_MANIFEST_BYTES, digest_bytes
from pipeline.registry.paths import folders_of
from pipeline.registry.stores.oci.documents import (
    CREATED,
    TITLE,
    Descriptor,
    Document,
    Manifest,
    describe,
    parse_manifest,
)
from pipeline.registry.stores.oci.tar import BLOCK_BYTES, END, file_header, folder_header
from pipeline.registry.stores.oci.tar import padding_bytes as tar_padding
from pipeline.registry.stores.store import Place

ARTIFACT_TYPE = "application/vnd.enginesmith.package.v1"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
ROOT = "models"
SIGNATURE = f"{ENGINE}/model.sig"
LARGE_BYTES = 8 << 20
"""From this size on a file has a layer of its own."""
MAX_LARGE_LAYERS = 100
"""Docker's overlay2 stacks at most 128 layers (docker/docker 20.10, `overlay2.maxDepth`); this
leaves some to an image that is built on ours."""
MANIFEST_OFFSET = 2 * BLOCK_BYTES

_PREFIX = "io.enginesmith.package."
_NAME, _VARIANT, _VERSION = f"{_PREFIX}name", f"{_PREFIX}variant", f"{_PREFIX}version"
_PACKAGE_DIGEST, _MANIFEST_BYTES = f"{_PREFIX}digest", f"{_PREFIX}manifest-bytes"
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

    def content_before(self, position: int) -> int:
        """How many bytes of the package's files precede a position of the tar."""
        return sum(
            min(max(position - member.offset, 0), member.file.size_bytes)
            for member in self.members
            if member.file.path not in {MANIFEST, SIGNATURE}
        )


@dataclass(frozen=True, kw_only=True)
class Image:
    """What an image manifest says of a package; nothing of it is proven.

    Attributes:
        document: Its bytes.
        layers: Names the tars.
        config: Names the image config.
        place: What it says it is.
        package_digest: What it says the SHA-256 of `manifest.json` is.
        manifest_bytes: What it says the size of `manifest.json` is; within bounds.
    """

    document: Document
    layers: tuple[Descriptor, ...]
    config: Descriptor
    place: Place
    package_digest: str
    manifest_bytes: int


def plan_layers(manifest: bytes, files: Sequence[FileDigest]) -> tuple[Layer, ...]:
    """The layers of a package, without that of the signature.

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


def signature_layer(data: bytes) -> bytes:
    """The tar with `engine/model.sig`."""
    file = FileDigest(path=SIGNATURE, size_bytes=len(data), sha256=digest_bytes(data))
    (member,) = plan_layer([file]).members
    return member.header + data + bytes(tar_padding(len(data))) + END


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
    """The image manifest."""
    return Manifest(
        artifact_type=ARTIFACT_TYPE,
        config=describe(config, CONFIG_TYPE),
        layers=tuple(layers),
        subject=None,
        annotations={
            TITLE: f"{place.name}/{place.variant}",
            CREATED: _EPOCH,
            _NAME: place.name,
            _VARIANT: place.variant,
            _VERSION: place.version,
            _PACKAGE_DIGEST: digest_bytes(manifest),
            _MANIFEST_BYTES: str(len(manifest)),
        },
    ).document()


def layer_descriptor(digest: str, size_bytes: int) -> Descriptor:
    """Names one tar."""
    return Descriptor(media_type=LAYER_TYPE, digest=digest, size_bytes=size_bytes)


def parse_image(document: Document, origin: str) -> Image:
    """Read an image manifest.

    Raises:
        CorruptError: It is not of a package, or longer than a manifest may be.
    """
    manifest = parse_manifest(document, origin)
    notes: Mapping[str, Any] = manifest.annotations
    if manifest.artifact_type != ARTIFACT_TYPE or not manifest.layers:
        raise CorruptError(f"{origin} is not a package of this program; remove that tag")
    try:
        size_bytes = int(notes[_MANIFEST_BYTES])
        image = Image(
            document=document,
            layers=manifest.layers,
            config=manifest.config,
            place=Place(name=notes[_NAME], variant=notes[_VARIANT], version=notes[_VERSION]),
            package_digest=notes[_PACKAGE_DIGEST],
            manifest_bytes=size_bytes,
        )
    except (KeyError, ValueError) as error:
        raise CorruptError(f"{origin} lacks the annotations of a package: {error!r}") from error
    if not 0 < size_bytes <= MAX_MANIFEST_BYTES:
        raise CorruptError(
            f"{origin}: {MANIFEST} of {size_bytes} bytes; it has at most {MAX_MANIFEST_BYTES}"
        )
    return image
