"""The bytes of a layer, read from a package's files; each file is hashed as it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.core.errors import CorruptError
from pipeline.core.values import FileDigest
from pipeline.registry.disk import disk_errors, open_regular
from pipeline.registry.manifest import MANIFEST
from pipeline.registry.stores.oci.image import Layer
from pipeline.registry.stores.oci.tar import END, padding_bytes

_CHUNK_BYTES = 1 << 20


def layer_content(layer: Layer, package_dir: Path, manifest: bytes) -> Iterator[bytes]:
    """A layer's tar, in chunks; never all of it in memory.

    Args:
        layer: The plan.
        package_dir: Where the files are.
        manifest: Stands for `manifest.json`.

    Raises:
        CorruptError: A file is not what the manifest says; when its last byte has been read.
        TransientError: The disk cannot be read now; or another error of `disk_errors`.
    """
    with ThreadPoolExecutor(1) as thread:
        for member in layer.members:
            yield member.header
            if member.file.path == MANIFEST:
                yield manifest
            else:
                yield from _file_content(package_dir / member.file.path, member.file, thread)
            yield bytes(padding_bytes(member.file.size_bytes))
        yield END


def _file_content(path: Path, file: FileDigest, thread: ThreadPoolExecutor) -> Iterator[bytes]:
    """A file's bytes; hashed in another thread, since the caller hashes the whole tar meanwhile."""
    digest = hashlib.sha256()
    size_bytes = 0
    with disk_errors(f"read {path}"):
        stream = open_regular(path)
    with stream:
        while True:
            with disk_errors(
                f"read {path}"
            ):  # not around the yield: the caller's faults are not ours
                chunk = stream.read(_CHUNK_BYTES)
            size_bytes += len(chunk)
            if size_bytes > file.size_bytes or not chunk:
                break
            hashed = thread.submit(digest.update, chunk)
            yield chunk
            hashed.result()
    if size_bytes != file.size_bytes or digest.hexdigest() != file.sha256:
        raise CorruptError(
            f"{path} is not what its manifest says ({size_bytes} bytes, wanted {file.size_bytes}; "
            f"SHA-256 {digest.hexdigest()}, wanted {file.sha256}); build the package again"
        )
