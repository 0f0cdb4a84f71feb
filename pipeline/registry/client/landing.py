"""One file while it lands in chunks, hashed in order behind them."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import CorruptError
from pipeline.core.values import FileDigest

_READ_BYTES = 1 << 20


@dataclass(kw_only=True)
class LandingFile:
    """A file whose chunks land.

    Attributes:
        number: In the manifest.
        file: What it must become.
        path: Where it lands.
        chunk_bytes: Size of all chunks but the last.
        again: It was wrong once, and is fetched for the second and last time.
    """

    number: int
    file: FileDigest
    path: Path
    chunk_bytes: int
    again: bool = False
    _descriptor: int | None = None
    _there: set[int] = field(default_factory=set)
    _hash: hashlib._Hash = field(default_factory=hashlib.sha256)
    _hashed: int = 0
    _busy: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def chunks(self) -> int:
        """How many there are; an empty file has one, which is empty."""
        return max(1, -(-self.file.size_bytes // self.chunk_bytes))

    @property
    def hashed(self) -> int:
        """Chunks that the hash has taken in."""
        return self._hashed

    @property
    def sha256(self) -> str:
        """Of the chunks that the hash has taken in, hex."""
        return self._hash.hexdigest()

    def span(self, chunk: int) -> tuple[int, int]:
        """First byte of a chunk, and the first byte after it."""
        start = chunk * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.file.size_bytes)

    def chunk_size(self, chunk: int) -> int:
        """Bytes of a chunk."""
        start, end = self.span(chunk)
        return end - start

    def open(self) -> int:
        """Its descriptor; made with its full size, so that chunks can be written anywhere."""
        with self._lock:
            if self._descriptor is None:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                self._descriptor = os.open(self.path, flags, 0o600)
                os.ftruncate(self._descriptor, self.file.size_bytes)
            return self._descriptor

    def write(self, data: memoryview, at: int) -> None:
        """Write bytes where they belong."""
        descriptor = self.open()
        while data:
            count = os.pwrite(descriptor, data, at)
            data, at = data[count:], at + count

    def close(self, *, sync: bool = False) -> None:
        """Close it; with `sync` its bytes are on the disk then."""
        with self._lock:
            if self._descriptor is not None:
                if sync:
                    os.fsync(self._descriptor)
                os.close(self._descriptor)
                self._descriptor = None

    def begin_again(self) -> None:
        """Forget all chunks; no thread may be at work on the file."""
        self.again = True
        self._there.clear()
        self._hash, self._hashed = hashlib.sha256(), 0

    def take(self, chunk: int, on_hashed: Callable[[], None]) -> bool:
        """A chunk has landed; hash as far as chunks are there.

        Args:
            chunk: Its number.
            on_hashed: Called after each chunk that was hashed.

        Returns:
            True once per file: for the caller whose call ended the hash.
        """
        with self._lock:
            self._there.add(chunk)
            if self._busy:
                return False
            self._busy = True
        try:
            while True:
                with self._lock:
                    if self._hashed not in self._there:
                        self._busy = False
                        return False
                self._hash_chunk(self._hashed)
                with self._lock:
                    self._hashed += 1
                    ended = self._hashed == self.chunks
                    self._busy = not ended
                on_hashed()
                if ended:
                    return True
        except BaseException:
            self._busy = False
            raise

    def _hash_chunk(self, chunk: int) -> None:
        """Hash the bytes of a chunk as they lie in the file."""
        descriptor, buffer = self.open(), memoryview(bytearray(_READ_BYTES))
        at, end = self.span(chunk)
        while at < end:
            count = os.preadv(descriptor, [buffer[: end - at]], at)
            if not count:
                raise CorruptError(f"{self.path} was shortened while it was fetched; pull again")
            self._hash.update(buffer[:count])
            at += count
