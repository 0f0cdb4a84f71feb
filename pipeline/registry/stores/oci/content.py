"""The bytes of a layer, read from a package's files: once to digest them, once to send them.

The first pass compares each file with the manifest. The second is checked by the registry, which
knows the layer by its digest.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from pipeline.core.errors import CorruptError
from pipeline.registry.disk import disk_errors, open_regular
from pipeline.registry.manifest import MANIFEST
from pipeline.registry.stores.oci.documents import Descriptor
from pipeline.registry.stores.oci.image import Layer, layer_descriptor
from pipeline.registry.stores.oci.tar import END, padding_bytes

_CHUNK_BYTES = 1 << 20


class LayerReader(io.RawIOBase):
    """A layer's tar as a file to read and to seek in; never all of it in memory.

    Args:
        layer: The plan.
        package_dir: Where the files are.
        manifest: Stands for `manifest.json`.
    """

    def __init__(self, layer: Layer, package_dir: Path, manifest: bytes) -> None:
        self._parts: list[tuple[int, int, bytes | Path]] = []  # start, end, content
        self.size_bytes = 0
        self._at = 0
        self._stack = ExitStack()
        self._open: tuple[Path, BinaryIO] | None = None
        for member in layer.members:
            self._add(member.header)
            if member.file.path == MANIFEST:
                self._add(manifest)
            else:
                self._add(package_dir / member.file.path, member.file.size_bytes)
            self._add(bytes(padding_bytes(member.file.size_bytes)))
        self._add(END)

    def read(self, count: int = -1) -> bytes:
        """At most `count` bytes, fewer where one file ends and the next begins."""
        count = _CHUNK_BYTES if count < 0 else count
        for start, end, content in self._parts:
            if start <= self._at < end:
                offset, count = self._at - start, min(count, end - self._at)
                data = (
                    content[offset : offset + count]
                    if isinstance(content, bytes)
                    else self._read_file(content, offset, count)
                )
                self._at += len(data)
                return data
        return b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position, from the start."""
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._stack.close()
        super().close()

    def _add(self, content: bytes | Path, size_bytes: int | None = None) -> None:
        size = len(content) if isinstance(content, bytes) else size_bytes or 0
        self._parts.append((self.size_bytes, self.size_bytes + size, content))
        self.size_bytes += size

    def _read_file(self, path: Path, offset: int, count: int) -> bytes:
        with disk_errors(f"read {path}"):
            if self._open is None or self._open[0] != path:
                self._stack.close()
                self._open = path, self._stack.enter_context(open_regular(path))
            stream = self._open[1]
            stream.seek(offset)
            data = stream.read(count)
        if not data:
            raise CorruptError(f"{path} is shorter than its manifest says; get the package again")
        return data


def digest_layer(layer: Layer, package_dir: Path, manifest: bytes) -> Descriptor:
    """Read a layer through, compare its files with their manifest, and name it.

    Raises:
        CorruptError: A file is not what the manifest says.
    """
    whole = hashlib.sha256()
    with ThreadPoolExecutor(1) as thread:  # a file is hashed twice, side by side
        for member in layer.members:
            whole.update(member.header)
            if member.file.path == MANIFEST:
                whole.update(manifest)
            else:
                own, size_bytes = hashlib.sha256(), 0
                for chunk in _chunks(package_dir / member.file.path, member.file.size_bytes):
                    hashed = thread.submit(own.update, chunk)
                    whole.update(chunk)
                    size_bytes += len(chunk)
                    hashed.result()
                if (size_bytes, own.hexdigest()) != (member.file.size_bytes, member.file.sha256):
                    raise CorruptError(
                        f"{package_dir / member.file.path} is not what its manifest says; get the "
                        "package again"
                    )
            whole.update(bytes(padding_bytes(member.file.size_bytes)))
        whole.update(END)
    return layer_descriptor(f"sha256:{whole.hexdigest()}", layer.size_bytes)


def _chunks(path: Path, size_bytes: int) -> Iterator[bytes]:
    """The bytes of a file; one chunk more than `size_bytes` at most."""
    with disk_errors(f"read {path}"):
        stream = open_regular(path)
    with stream:
        while size_bytes >= 0:
            with disk_errors(f"read {path}"):  # not around the yield: the caller's faults are not
                chunk = stream.read(_CHUNK_BYTES)  # the disk's
            if not chunk:
                return
            size_bytes -= len(chunk)
            yield chunk
