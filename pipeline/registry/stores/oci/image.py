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

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rfc8785

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.values import FileDigest
from pipeline.registry.disk import checked_chunks
from pipeline.registry.manifest import MANIFEST, digest_bytes
from pipeline.registry.paths import folders_of
from pipeline.registry.store import Place
from pipeline.registry.stores.oci.documents import (
    CREATED,
    MAX_DOCUMENT_BYTES,
    TITLE,
    Descriptor,
    Manifest,
    describe,
    parse,
)

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
_END = bytes(2 * tarfile.BLOCKSIZE)
"""Two zero blocks end an archive."""


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
        return last.offset + _padded(last.file.size_bytes) + len(_END)

    def content(self, package_dir: Path, manifest: bytes) -> Iterator[bytes]:
        """The tar, in chunks; never all of it in memory.

        Args:
            package_dir: Where the files are.
            manifest: Stands for `manifest.json`.

        Raises:
            CorruptError: A file is not what the manifest says; when its last byte has been read.
        """
        for member in self.members:
            yield member.header
            if member.file.path == MANIFEST:
                yield manifest
            else:
                yield from checked_chunks(package_dir / member.file.path, member.file)
            yield bytes(_padded(member.file.size_bytes) - member.file.size_bytes)
        yield _END

    def describe(self, package_dir: Path, manifest: bytes) -> Descriptor:
        """Read it through, and name it.

        Raises:
            CorruptError: A file is not what the manifest says.
        """
        whole = hashlib.sha256()
        for chunk in self.content(package_dir, manifest):
            whole.update(chunk)
        digest = f"sha256:{whole.hexdigest()}"
        return Descriptor(media_type=LAYER_TYPE, digest=digest, size=self.size_bytes)


@dataclass(frozen=True, kw_only=True)
class Image:
    """What an image manifest says of a package; nothing of it is proven.

    Attributes:
        document: Its bytes.
        layers: Names the tars.
        manifest: What it says the bytes of `manifest.json` are.
    """

    document: bytes
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
        header = b"".join(map(_header, new)) + _header(path, file.size_bytes)
        position += len(header)
        members.append(Member(file=file, header=header, offset=position))
        position += _padded(file.size_bytes)
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


def make_image(place: Place, manifest: bytes, config: bytes, layers: Sequence[Descriptor]) -> bytes:
    """The image manifest.

    Raises:
        PipelineError: It lists more files than an image can.
    """
    document = Manifest(
        artifact_type=ARTIFACT_TYPE,
        config=describe(config, CONFIG_TYPE),
        layers=tuple(layers),
        annotations={TITLE: str(place), CREATED: _EPOCH, _MANIFEST: manifest.decode()},
    ).document()
    if len(document) > MAX_DOCUMENT_BYTES:
        raise PipelineError(
            f"{place} has too many files for an OCI registry, whose manifests have at most "
            f"{MAX_DOCUMENT_BYTES} bytes; publish it to a folder or to S3"
        )
    return document


def parse_image(document: bytes, origin: str) -> Image:
    """Read an image manifest.

    Raises:
        CorruptError: It is not of a package.
    """
    manifest = parse(Manifest, document, origin)
    stated = (manifest.annotations or {}).get(_MANIFEST)
    if manifest.artifact_type != ARTIFACT_TYPE or not manifest.layers or not stated:
        raise CorruptError(f"{origin} is not a package of this program; remove that tag")
    return Image(document=document, layers=manifest.layers, manifest=stated.encode())


def _header(path: str, size_bytes: int | None = None) -> bytes:
    """The tar entry of a file, or of a folder if no size is given.

    It depends on path and size only, so that equal files make equal layers. A pax header precedes
    it only where ustar has no room: a path that is not ASCII or longer than 100 bytes, a size of
    8 GiB or more.
    """
    entry = tarfile.TarInfo(path)
    entry.type = tarfile.DIRTYPE if size_bytes is None else tarfile.REGTYPE
    entry.mode = 0o755 if size_bytes is None else 0o444
    entry.size = size_bytes or 0
    return entry.tobuf(tarfile.PAX_FORMAT)


def _padded(size_bytes: int) -> int:
    """What a file takes in a tar."""
    return size_bytes + -size_bytes % tarfile.BLOCKSIZE
