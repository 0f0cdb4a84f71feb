"""The bytes of a layer, read from a package's files: once to digest them, once to send them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.errors import CorruptError
from pipeline.registry.disk import disk_errors, open_regular
from pipeline.registry.manifest import MANIFEST
from pipeline.registry.stores.oci.documents import Descriptor
from pipeline.registry.stores.oci.image import Layer, layer_descriptor
from pipeline.registry.stores.oci.tar import END, padding_bytes

_CHUNK_BYTES = 1 << 20


def layer_content(
    layer: Layer, package_dir: Path, manifest: bytes, *, compare: bool = False
) -> Iterator[bytes]:
    """A layer's tar, in chunks; never all of it in memory.

    Args:
        layer: The plan.
        package_dir: Where the files are.
        manifest: Stands for `manifest.json`.
        compare: Compare each file with its SHA-256; a registry compares the whole layer.

    Raises:
        CorruptError: A file is not what the manifest says; when its last byte has been read.
    """
    for member in layer.members:
        yield member.header
        if member.file.path == MANIFEST:
            yield manifest
        else:
            path, left = package_dir / member.file.path, member.file.size_bytes
            digest = hashlib.sha256()
            with disk_errors(f"read {path}"):
                stream = open_regular(path)
            with stream:
                # One byte more than there should be, to see that a file has grown.
                while left >= 0 and (chunk := stream.read(min(_CHUNK_BYTES, left + 1))):
                    if compare:
                        digest.update(chunk)
                    left -= len(chunk)
                    yield chunk
            if left or (compare and digest.hexdigest() != member.file.sha256):
                raise CorruptError(f"{path} is not what its manifest says; get the package again")
        yield bytes(padding_bytes(member.file.size_bytes))
    yield END


def digest_layer(layer: Layer, package_dir: Path, manifest: bytes) -> Descriptor:
    """Read a layer through, and name it.

    Raises:
        CorruptError: A file is not what the manifest says.
    """
    whole = hashlib.sha256()
    for chunk in layer_content(layer, package_dir, manifest, compare=True):
        whole.update(chunk)
    return layer_descriptor(f"sha256:{whole.hexdigest()}", layer.size_bytes)
