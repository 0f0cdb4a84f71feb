"""A store whose bytes suffer on their way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.errors import TransientError
from pipeline.core.published import FileDigest
from pipeline.registry.store import Place, Store

Fault = Callable[[Iterator[bytes], FileDigest, int], Iterator[bytes]]
"""(chunks of the real store, file, offset) -> what the client gets."""


@dataclass(kw_only=True)
class FaultyStore:
    """`Store` around another one.

    Attributes:
        store: The real one.
        faults: Taken one by one, one for each opened file; afterwards all is well.
        always: Applied to each opened file after them.
        local: Whether it says to be a folder of this machine.
        opened: (path, offset, end) of each opened file.
    """

    store: Store
    faults: list[Fault] = field(default_factory=list)
    always: Fault | None = None
    local: bool = True
    opened: list[tuple[str, int, int | None]] = field(default_factory=list)
    sent_bytes: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    @contextlib.contextmanager
    def open_file(
        self, place: Place, file: FileDigest, offset: int = 0, end: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        with self._lock:
            self.opened.append((file.path, offset, end))
            fault = self.faults.pop(0) if self.faults else self.always
        with self.store.open_file(place, file, offset, end) as chunks:
            yield self._counted(chunks if fault is None else fault(chunks, file, offset))

    def _counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            with self._lock:
                self.sent_bytes += len(chunk)
            yield chunk


def small(chunks: Iterator[bytes], size_bytes: int = 1000) -> Iterator[bytes]:
    """The same bytes in small chunks."""
    for chunk in chunks:
        for start in range(0, len(chunk), size_bytes):
            yield chunk[start : start + size_bytes]


def good(chunks: Iterator[bytes], file: FileDigest, offset: int) -> Iterator[bytes]:
    """No fault."""
    return chunks


def reset_after(count: int) -> Fault:
    """The connection breaks after some bytes."""

    def fault(chunks: Iterator[bytes], file: FileDigest, offset: int) -> Iterator[bytes]:
        for chunk in small(chunks, count):
            yield chunk
            raise TransientError("connection reset by peer")
        raise TransientError("connection reset by peer")

    return fault


def short_after(count: int) -> Fault:
    """The answer ends early, without an error."""

    def fault(chunks: Iterator[bytes], file: FileDigest, offset: int) -> Iterator[bytes]:
        if count:
            yield from [chunk for _, chunk in zip(range(1), small(chunks, count), strict=False)]

    return fault


def refused(chunks: Iterator[bytes], file: FileDigest, offset: int) -> Iterator[bytes]:
    """No byte at all."""
    raise TransientError("stalled for 60 s")
    yield b""


def flipped(chunks: Iterator[bytes], file: FileDigest, offset: int) -> Iterator[bytes]:
    """One bit of the first chunk is wrong."""
    for number, chunk in enumerate(small(chunks)):
        yield bytes([chunk[0] ^ 1]) + chunk[1:] if number == 0 else chunk
