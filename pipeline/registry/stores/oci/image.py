"""A package as a valid image: its documents, its tar layers, where each file's bytes lie in them.

Everything here follows from `manifest.json` alone, so a reader computes the place of a file and
trusts no index:

    layer 0        models/, models/manifest.json, then every small file
    layer 1, ...   one large file each (several, where a package has more than MAX_LARGE_LAYERS)

Each layer repeats the folders that lead to its files: engines unpack layers one by one and would
make up the mode of a folder that is not there. An annotation repeats `manifest.json`, so that one
request fetches it. Equal packages are equal images: statements are not in them.
"""

from __future__ import annotations

import functools
import hashlib
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from pipeline.core.errors import CorruptError, NotFoundError
from pipeline.core.published import FileDigest
from pipeline.registry.manifest import MANIFEST, digest_bytes, files_of, folders_of, parse_manifest

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
ARTIFACT_TYPE = "application/vnd.enginesmith.package.v1"
TITLE = "org.opencontainers.image.title"
PACKAGE_MANIFEST = "io.enginesmith.package.manifest"
MAX_DOCUMENT_BYTES = 4 << 20
"""What registries take at least (distribution-spec 1.1, "Pushing manifests"), and most take."""
LARGE_BYTES = 8 << 20
"""From this size on a file has a layer of its own."""
MAX_LARGE_LAYERS = 100
"""Docker's overlay2 stacks at most 128 layers (docker/docker 20.10, `overlay2.maxDepth`); this
leaves some to an image that is built on ours."""
END = bytes(2 * tarfile.BLOCKSIZE)
"""Two zero blocks end an archive."""
_ROOT = "models"


class _Value(BaseModel):
    model_config = ConfigDict(
        frozen=True, strict=True, alias_generator=to_camel, populate_by_name=True
    )


class Descriptor(_Value):
    """Names bytes by their digest; `data` are these bytes in base64, when they travel with it."""

    media_type: str
    digest: Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0, lt=2**53)]
    artifact_type: str | None = None
    annotations: dict[str, str] | None = None
    data: str | None = None

    def annotation(self, key: str) -> str:
        return (self.annotations or {}).get(key, "")


class Manifest(_Value):
    """An image or an artifact."""

    artifact_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    annotations: dict[str, str] | None = None


class Listing(_Value):
    """One page of manifests, tags or repositories."""

    manifests: list[Descriptor] | None = None
    tags: list[str] | None = None
    repositories: list[str] | None = None


_Parsed = TypeVar("_Parsed", bound=BaseModel)


def parse(kind: type[_Parsed], data: bytes, origin: str) -> _Parsed:
    """Read a document, without unknown keys; CorruptError if it is none of this kind."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in fault["loc"])
        raise CorruptError(
            f"{origin} is not an OCI {kind.__name__.lower()}: {where[:200]} {fault['msg']}"
        ) from error


def digest_of(data: bytes) -> str:
    """The OCI digest of bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file in a tar, at `offset`; `header` is what precedes it, its own entry included."""

    file: FileDigest
    header: bytes
    offset: int

    @property
    def padding(self) -> int:
        return -self.file.size_bytes % tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A tar of some files, as a plan."""

    members: tuple[Member, ...]

    @property
    def size_bytes(self) -> int:
        last = self.members[-1]
        return last.offset + last.file.size_bytes + last.padding + len(END)


def plan_layers(manifest: bytes, files: Sequence[FileDigest]) -> tuple[Layer, ...]:
    """The layers of a package, from the bytes of `manifest.json` and the files that it lists."""
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
        path = f"{_ROOT}/{file.path}"
        new = [folder for folder in folders_of(path) if folder not in folders]
        folders.update(new)
        header = b"".join(map(_header, new)) + _header(path, file.size_bytes)
        members.append(Member(file=file, header=header, offset=position + len(header)))
        position = members[-1].offset + file.size_bytes + members[-1].padding
    return Layer(members=tuple(members))


@dataclass(frozen=True, kw_only=True)
class Image:
    """What an image manifest says of a package, of its `manifest.json`, too; nothing is proven."""

    document: bytes
    layers: tuple[Descriptor, ...]
    manifest: bytes

    @functools.cached_property
    def _places(self) -> dict[str, tuple[Descriptor, Layer, int]]:
        """File -> the layer that it is in, what it should be, and where its bytes begin."""
        planned = plan_layers(self.manifest, files_of(parse_manifest(self.manifest, MANIFEST)))
        return {
            member.file.path: (blob, layer, member.offset)
            for blob, layer in zip(self.layers, planned, strict=False)
            for member in layer.members
        }

    def find(self, path: str) -> tuple[str, int]:
        """The digest of the layer that has a file, and where in it the file's bytes begin.

        NotFoundError, or CorruptError if the layer has not the size that the manifest makes.
        """
        if path not in self._places:
            raise NotFoundError(f"the image has no file {path}")
        blob, layer, offset = self._places[path]
        if layer.size_bytes != blob.size:
            wanted = f"where its manifest makes {layer.size_bytes}; publish it again"
            raise CorruptError(f"{path} is in a layer of {blob.size} bytes {wanted}")
        return blob.digest, offset


def parse_image(document: bytes, origin: str) -> Image:
    """Read an image manifest; CorruptError if it is not of a package."""
    manifest = parse(Manifest, document, origin)
    stated = (manifest.annotations or {}).get(PACKAGE_MANIFEST)
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
