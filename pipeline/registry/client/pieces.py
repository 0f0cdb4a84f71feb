"""One file while it lands in pieces, and the journal of the pieces that have.

The SHA-256 of a file can only be taken in order, while its pieces land in any. So whoever lands the
piece that the hash waits for takes it along, reading the bytes back from the page cache: they are
hashed as they lie in the file, no thread of its own is needed, and nobody runs so far ahead that
the disk would have to be read again (`WINDOW_BYTES`).

The journal has a line per hashed piece: the SHA-256 of the file up to its end, which costs
nothing, since the hash stands there anyway. After a kill the pieces are read again, as the hash
needs them; where it differs from the journal, that piece is damaged, and it alone is fetched again.
Whether the file is right, its SHA-256 decides.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from pipeline.core.errors import CorruptError
from pipeline.core.values import FileDigest
from pipeline.registry.disk import read_bounded

WINDOW_BYTES = 512 << 20
"""How far the newest piece may be ahead of the hash: what the page cache of a machine that serves
models holds, and what a kill can cost where the disk and the network are faster than the hash."""
_CHUNK_BYTES = 1 << 20
_SYNC_FILE_RANGE_WRITE = 2  # of Linux, <linux/fs.h>
_JOURNAL = "journal"
_MAX_JOURNAL_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Journal:
    """Which pieces of a package have landed in a folder.

    Attributes:
        folder: Where the files are.
        digest: Of the package.
        piece_bytes: Size of a piece; a journal of another size is worth nothing.
    """

    folder: Path
    digest: str
    piece_bytes: int

    @property
    def path(self) -> Path:
        return self.folder / _JOURNAL

    @property
    def _head(self) -> str:
        return f"2 {self.digest} {self.piece_bytes}"

    def read(self) -> dict[int, dict[int, str]] | None:
        """Number of a file -> that of a piece -> SHA-256 up to its end; None if it is of others.

        A line that a crash tore off counts for nothing.
        """
        try:
            text = read_bounded(self.path, _MAX_JOURNAL_BYTES).decode("ascii", "replace")
        except CorruptError:
            return None
        head, *lines = text.split("\n")
        if head != self._head:
            return None
        landed: dict[int, dict[int, str]] = {}
        for line in lines[:-1]:
            try:
                file, piece, sha256 = line.split(" ")
                landed.setdefault(int(file), {})[int(piece)] = sha256
            except ValueError:
                continue
        return landed

    @contextlib.contextmanager
    def writing(self) -> Iterator[JournalWriter]:
        """Append to it; begun anew if it is not about this."""
        fresh = self.read() is None
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        descriptor = os.open(self.path, flags | (os.O_TRUNC if fresh else 0), 0o600)
        try:
            # An empty line closes one that was torn off.
            os.write(descriptor, (f"{self._head}\n" if fresh else "\n").encode())
            yield JournalWriter(descriptor=descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, kw_only=True)
class JournalWriter:
    """The open journal."""

    descriptor: int

    def landed(self, file: int, piece: int, sha256: str) -> None:
        """Note a piece that was written and hashed; one write, so that lines stay whole."""
        os.write(self.descriptor, f"{file} {piece} {sha256}\n".encode())


@dataclass(kw_only=True)
class LandingFile:
    """A file whose pieces land.

    Attributes:
        number: In the manifest.
        file: What it must become.
        path: Where it lands.
        piece_bytes: Size of all pieces but the last.
        kept: Piece that an earlier run left -> SHA-256 of the file up to its end; unproven.
        again: It was wrong once, and is fetched for the second and last time.
    """

    number: int
    file: FileDigest
    path: Path
    piece_bytes: int
    kept: dict[int, str] = field(default_factory=dict)
    again: bool = False
    _descriptor: int | None = None
    _there: set[int] = field(default_factory=set)
    _hash: hashlib._Hash = field(default_factory=hashlib.sha256)
    _hashed: int = 0
    _busy: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def pieces(self) -> int:
        """How many there are; an empty file has one, which is empty."""
        return max(1, -(-self.file.size_bytes // self.piece_bytes))

    @property
    def hashed(self) -> int:
        """Pieces that the hash has taken in."""
        return self._hashed

    @property
    def sha256(self) -> str:
        """Of the pieces that the hash has taken in, hex."""
        return self._hash.hexdigest()

    def span(self, piece: int) -> tuple[int, int]:
        """First byte of a piece, and the first byte after it."""
        start = piece * self.piece_bytes
        return start, min(start + self.piece_bytes, self.file.size_bytes)

    def piece_size(self, piece: int) -> int:
        """Bytes of a piece."""
        start, end = self.span(piece)
        return end - start

    def open(self) -> int:
        """Its descriptor; made with its full size, so that pieces can be written anywhere."""
        with self._lock:
            if self._descriptor is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                self._descriptor = os.open(self.path, flags, 0o644)
                os.ftruncate(self._descriptor, self.file.size_bytes)
            return self._descriptor

    def close(self, *, sync: bool = False) -> None:
        """Close it; with `sync` its bytes are on the disk then."""
        with self._lock:
            if self._descriptor is not None:
                if sync:
                    os.fsync(self._descriptor)
                os.close(self._descriptor)
                self._descriptor = None

    def flush(self, piece: int) -> None:
        """Have the kernel begin to write a piece to the disk, so that `close` waits for little."""
        if (sync_file_range := _sync_file_range()) is not None:
            start, end = self.span(piece)
            # What it says is of no account: `close` asks the disk, and hears of its faults.
            sync_file_range(self.open(), start, end - start, _SYNC_FILE_RANGE_WRITE)

    def begin_again(self) -> None:
        """Forget all pieces; nobody may be at work on the file."""
        self.again = True
        self.kept.clear()
        self._there.clear()
        self._hash, self._hashed = hashlib.sha256(), 0

    def take(
        self, piece: int, refetch: Callable[[int], None], on_hashed: Callable[[int], None]
    ) -> bool:
        """A piece has landed; hash as far as pieces are there.

        Args:
            piece: Its number.
            refetch: Called for a piece of an earlier run that is damaged; lands it.
            on_hashed: Called with each piece that was hashed; `sha256` is up to its end then.

        Returns:
            True once per file: for the caller whose call ended the hash.
        """
        with self._lock:
            self._there.add(piece)
            if self._busy:
                return False
            self._busy = True
        try:
            while True:
                with self._lock:
                    if self._hashed not in self._there:
                        self._busy = False
                        return False
                self._hash_next(refetch)
                with self._lock:
                    self._hashed += 1
                    ended = self._hashed == self.pieces
                    self._busy = not ended
                on_hashed(self._hashed - 1)
                if ended:
                    return True
        except BaseException:
            self._busy = False
            raise

    def _hash_next(self, refetch: Callable[[int], None]) -> None:
        before = self._hash.copy()
        for view in self._chunks(self._hashed):
            self._hash.update(view)
        if self.kept.pop(self._hashed, self.sha256) != self.sha256:
            refetch(self._hashed)
            self._hash = before
            self._hash_next(refetch)  # nothing is kept of it any more, so this ends

    def _chunks(self, piece: int) -> Iterator[memoryview]:
        """The bytes of a piece as they lie in the file; each chunk lives until the next."""
        descriptor, buffer = self.open(), memoryview(bytearray(_CHUNK_BYTES))
        at, end = self.span(piece)
        while at < end:
            count = os.preadv(descriptor, [buffer[: end - at]], at)
            if not count:
                raise CorruptError(f"{self.path} was shortened while it was fetched; pull again")
            yield buffer[:count]
            at += count


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """sync_file_range(2), which Python does not offer; None where the C library has none."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    function.restype = ctypes.c_int
    return cast("Callable[[int, int, int, int], int]", function)
