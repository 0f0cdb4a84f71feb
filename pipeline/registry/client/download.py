"""Fetch the files of a package: chunks in parallel, resumed, every byte verified.

The record (JSON lines) names the chunks that landed in a work folder, so that a killed pull goes on
from them. The SHA-256 of a file can only be taken in order while its chunks land in any: whoever
lands the chunk that the hash waits for takes it along, reading the bytes back from the page cache.
A file that is wrong as a whole is fetched once more, in case bytes were damaged on their way; wrong
again, it is wrong in the registry. Not a byte more than the manifest says is written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import CorruptError, NotFoundError, TransientError
from pipeline.core.values import FileDigest
from pipeline.registry.client.landing import LandingFile
from pipeline.registry.disk import disk_errors, read_bounded
from pipeline.registry.store import OnBytes, Place, Store
from pipeline.registry.workfolder import WorkFolder

log = logging.getLogger(__name__)

PACKAGE = "package"
"""Folder in the work folder that the files land in."""
_RECORD = "landed.jsonl"
_MAX_RECORD_BYTES = 64 << 20
_WINDOW_BYTES = 512 << 20
"""How far the newest chunk may be ahead of the hash: what the page cache of a machine that serves
models holds, and what a kill can cost where disk and network are faster than the hash."""
_TICK_S = 1.0
_STOP_WAIT_S = 10.0
_ENDS = 3
"""Answers in a row that end at the same byte without a fault, until a file counts as too short."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """How files are fetched.

    Attributes:
        jobs: Chunks on their way at once.
        chunk_bytes: Size of a chunk: one line of the record, one request, and what a kill can cost
            per job. With 16 MiB docker-registry took a quarter more of the processor than with 32
            (measured on 2026-11-29).
        tries: Attempts in a row without a new byte, for one chunk.
        first_wait_s: Before the second attempt; doubled for each after it, 10 s at most.
        floor_bytes_s: What all chunks together must bring, else the store counts as stalled.
        floor_s: Over so many seconds.
    """

    jobs: int = 8
    chunk_bytes: int = 32 << 20
    tries: int = 6
    first_wait_s: float = 0.5
    floor_bytes_s: int = 16 << 10
    floor_s: float = 30.0

    def wait_s(self, failed: int) -> float:
        """How long to wait after `failed` attempts in a row.

        Between half and all of the doubled time, by chance: a crowd of clients that a server
        dropped in one moment must not come back in one moment.
        """
        whole: float = min(10.0, self.first_wait_s * 2.0 ** (failed - 1))
        return whole * random.uniform(0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Which chunks of a package have landed in a work folder.

    Attributes:
        folder: The work folder.
        digest: Of the package.
        chunk_bytes: Size of a chunk; a record of another size is worth nothing.
    """

    folder: Path
    digest: str
    chunk_bytes: int

    @property
    def _head(self) -> dict[str, object]:
        return {"digest": self.digest, "chunk_bytes": self.chunk_bytes}

    def read(self) -> set[tuple[int, int]]:
        """(number of a file, number of a chunk) of all that landed; empty if it is of others.

        A line that a crash tore off counts for nothing.
        """
        with contextlib.suppress(CorruptError, ValueError):
            data = read_bounded(self.folder / _RECORD, _MAX_RECORD_BYTES)
            head, *lines = data.decode().split("\n")
            if json.loads(head) == self._head:
                return {pair for line in lines if (pair := _pair(line)) is not None}
        return set()

    @contextlib.contextmanager
    def writing(self, *, fresh: bool) -> Iterator[Callable[[int, int], None]]:
        """A function that adds a landed chunk.

        Args:
            fresh: Begin anew.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        path = self.folder / _RECORD
        descriptor = os.open(path, flags | (os.O_TRUNC if fresh else 0), 0o600)

        def add(*values: object) -> None:
            os.write(descriptor, f"{json.dumps(values)}\n".encode())  # whole lines, any thread

        try:
            # An empty line closes one that was torn off.
            os.write(descriptor, f"{json.dumps(self._head) if fresh else ''}\n".encode())
            yield add
        finally:
            os.close(descriptor)


def _pair(line: str) -> tuple[int, int] | None:
    try:
        file, chunk = json.loads(line)
    except (ValueError, TypeError):
        return None
    return (file, chunk) if isinstance(file, int) and isinstance(chunk, int) else None


def download(
    store: Store,
    place: Place,
    files: Sequence[FileDigest],
    work: WorkFolder,
    digest: str,
    transfer: Transfer,
    on_bytes: OnBytes,
) -> int:
    """Fetch all files of a package into `work.dir / PACKAGE`.

    Args:
        store: Where they lie.
        place: The version.
        files: What its verified manifest lists.
        work: What it already has of this package is hashed and kept.
        digest: Of the package.
        transfer: How.
        on_bytes: Called with numbers of bytes that are there, fetched or found; may be negative.

    Returns:
        How many bytes the store sent.

    Raises:
        CorruptError: A file is not what the manifest says, also when fetched again.
        TransientError: The store failed too often or is too slow, or the disk is full.
        AccessError: The store refuses, or the folder is not writable.
    """
    record = Record(folder=work.dir, digest=digest, chunk_bytes=transfer.chunk_bytes)
    with disk_errors(f"write {work.dir.parent}"):
        landed = record.read()
        with record.writing(fresh=not landed) as add:
            run = _Download(
                store=store,
                place=place,
                transfer=transfer,
                landed=landed,
                add=add,
                on_bytes=on_bytes,
                files=[
                    LandingFile(
                        number=number,
                        file=file,
                        path=work.dir / PACKAGE / file.path,
                        chunk_bytes=transfer.chunk_bytes,
                    )
                    for number, file in enumerate(files)
                ],
            )
            return run.run(work.touch)


class _StoppedError(Exception):
    """Another thread failed, or the user stopped us."""


@dataclass(kw_only=True)
class _Download:
    store: Store
    place: Place
    transfer: Transfer
    landed: set[tuple[int, int]]
    add: Callable[[int, int], None]
    on_bytes: OnBytes
    files: Sequence[LandingFile]
    _queue: deque[tuple[LandingFile, int]] = field(default_factory=deque)
    _open: int = 0  # files that are not right yet
    _waiting: int = 0  # threads that wait for the store
    _fetched_bytes: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _stop: threading.Event = field(default_factory=threading.Event)
    _errors: list[BaseException] = field(default_factory=list)

    def run(self, touch: Callable[[], None]) -> int:
        """Fetch everything; raises what the first failing thread raised."""
        self._open = len(self.files)
        self._queue.extend((file, chunk) for file in self.files for chunk in range(file.chunks))
        # Daemons: a store that hangs must not keep the process alive after Ctrl-C.
        workers = [
            threading.Thread(target=self._work, name=f"pull-{number}", daemon=True)
            for number in range(min(self.transfer.jobs, len(self._queue)))
        ]
        for worker in workers:
            worker.start()
        try:
            floor = _Floor(transfer=self.transfer, url=self.store.url)
            for worker in workers:
                while worker.is_alive():
                    worker.join(_TICK_S)
                    touch()
                    floor.check(self._fetched_bytes, waiting=self._waiting > 0)
        finally:
            self._halt()
            ends_s = time.monotonic() + _STOP_WAIT_S
            for worker in workers:
                worker.join(max(0.0, ends_s - time.monotonic()))
            if not any(worker.is_alive() for worker in workers):
                for file in self.files:
                    file.close()
        if self._errors:
            raise self._errors[0]
        return self._fetched_bytes

    def _halt(self) -> None:
        with self._changed:
            self._stop.set()
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while (task := self._next()) is not None:
                self._land(*task)
        except _StoppedError:
            return
        except BaseException as error:
            with self._changed:
                self._errors.append(error)
            self._halt()

    def _next(self) -> tuple[LandingFile, int] | None:
        """The next chunk, not too far ahead of its file's hash; None when all is done.

        The chunk that a hash waits for was handed out before, so waiting ends.
        """
        with self._changed:
            while not self._stop.is_set() and self._open:
                if self._queue:
                    file, chunk = self._queue[0]
                    ahead = (chunk - file.hashed) * self.transfer.chunk_bytes
                    if ahead < _WINDOW_BYTES or chunk == file.hashed:
                        return self._queue.popleft()
                self._changed.wait()
        return None

    def _land(self, file: LandingFile, chunk: int) -> None:
        file.open()
        if (file.number, chunk) in self.landed:
            self._report(file.chunk_size(chunk), fetched=0)
        else:
            self._fetch(file, chunk)
            self.add(file.number, chunk)
        if file.take(chunk, self._hashed):
            self._finish(file)

    def _hashed(self) -> None:
        with self._changed:
            self._changed.notify_all()
        if self._stop.is_set():
            raise _StoppedError

    def _finish(self, file: LandingFile) -> None:
        """All chunks of a file are there: it is right, or fetched once more."""
        if file.sha256 == file.file.sha256:
            file.close(sync=True)
            with self._changed:
                self._open -= 1
                self._changed.notify_all()
            return
        fault = (
            f"{self.store.url}: {file.file.path} of {self.place} has SHA-256 {file.sha256}, "
            f"its manifest says {file.file.sha256}"
        )
        if file.again:
            raise CorruptError(f"{fault}; nothing was kept. Publish it again, or pull another one")
        log.warning("%s; fetching it once more", fault)
        file.begin_again()
        self._report(-file.file.size_bytes, fetched=0)
        with self._changed:
            self.landed = {pair for pair in self.landed if pair[0] != file.number}
            self._queue.extendleft((file, chunk) for chunk in reversed(range(file.chunks)))
            self._changed.notify_all()

    def _fetch(self, file: LandingFile, chunk: int) -> None:
        """Fetch a chunk into its file, on its way to the disk; on from where an answer ended."""
        at, end = file.span(chunk)
        in_a_row = ended_in_a_row = 0  # attempts without a new byte; those of them without a fault
        while True:
            before = at
            fault: TransientError | None = None
            try:
                # A generator: so a fault of our disk is not taken for one of the store's.
                with contextlib.closing(self._chunks(file, at, end)) as chunks:
                    for data in chunks:
                        file.write(data, at)
                        at += len(data)
                        self._report(len(data), fetched=len(data))
                if at == end:
                    file.flush(chunk)
                    return
            except TransientError as error:
                fault = error
            in_a_row = 0 if at > before else in_a_row + 1
            ended_in_a_row = 0 if at > before or fault else ended_in_a_row + 1
            if ended_in_a_row >= _ENDS:
                raise CorruptError(
                    f"{self.store.url}: {file.file.path} of {self.place} ends at byte {at}, its "
                    f"manifest says {file.file.size_bytes}; nothing was kept. Publish it again, or "
                    "pull another one"
                )
            fault = fault or TransientError(
                f"{self.store.url} sent {file.file.path} only up to byte {at} of "
                f"{file.file.size_bytes}; run the same command again"
            )
            if in_a_row >= self.transfer.tries:
                raise fault
            self._pause(fault, at, max(1, in_a_row))

    def _pause(self, fault: TransientError, at: int, failed: int) -> None:
        """Wait before the next attempt; the floor counts this as waiting for the store."""
        wait_s = self.transfer.wait_s(failed)
        log.info("%s; going on from byte %d in %.1f s", fault, at, wait_s)
        with self._counted():
            if self._stop.wait(wait_s):
                raise _StoppedError

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count this thread among those that wait for the store."""
        with self._changed:
            self._waiting += 1
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1

    def _chunks(self, file: LandingFile, at: int, end: int) -> Generator[memoryview, None, None]:
        """What the store sends from `at` on, cut at `end`.

        Raises:
            CorruptError: The file goes on where it must end, or is not there.
            NotFoundError: The whole version is not there any more.
        """
        last = end == file.file.size_bytes
        try:
            with self.store.open_file(self.place, file.file, at, None if last else end) as chunks:
                while (data := self._read(chunks)) is not None:
                    view = memoryview(data)[: end - at]
                    at += len(view)
                    if view:
                        yield view
                    if last and len(data) > len(view):
                        raise CorruptError(
                            f"{self.store.url}: {file.file.path} of {self.place} is longer than "
                            f"the {file.file.size_bytes} bytes that its manifest says; nothing "
                            "was kept"
                        )
                    if at == end and not last:
                        return
        except (CorruptError, NotFoundError) as error:
            self._require_version(error)
            if isinstance(error, CorruptError):
                raise
            raise CorruptError(f"{self.place} has no {file.file.path}: {error}") from error
        except TransientError:
            if at < end:  # else it broke after the last byte, and the digest decides
                raise

    def _read(self, chunks: Iterator[bytes]) -> bytes | None:
        """The store's next bytes; None at its end."""
        if self._stop.is_set():
            raise _StoppedError
        with self._counted():
            return next(chunks, None)

    def _require_version(self, cause: Exception) -> None:
        """A file may be missing since the whole version went: pullers have no lease on it."""
        try:
            self.store.read_manifest(self.place)
        except NotFoundError:
            raise NotFoundError(
                f"{self.place} was removed from {self.store.url} while it was fetched; pull again "
                "for what the channel points to now"
            ) from cause

    def _report(self, count: int, *, fetched: int) -> None:
        with self._changed:
            self._fetched_bytes += fetched
            self.on_bytes(count)


@dataclass(kw_only=True)
class _Floor:
    """The slowest that a store may be while we wait for it."""

    transfer: Transfer
    url: str
    _since: tuple[float, int] | None = None  # when the window began, and the bytes by then

    def check(self, fetched_bytes: int, *, waiting: bool) -> None:
        """Compare what came with the floor.

        Args:
            fetched_bytes: By now.
            waiting: Whether any thread waits for the store; if none does, the disk is at work.

        Raises:
            TransientError: Too little in a whole window.
        """
        now_s = time.monotonic()
        wanted = self.transfer.floor_bytes_s * self.transfer.floor_s
        if self._since is None or not waiting or fetched_bytes - self._since[1] >= wanted:
            self._since = (now_s, fetched_bytes) if waiting else None
        elif now_s - self._since[0] > self.transfer.floor_s:
            raise TransientError(
                f"{self.url} sent {fetched_bytes - self._since[1]} bytes in "
                f"{self.transfer.floor_s:.0f} s, and {wanted:.0f} are the least; what has landed "
                "is kept: run the same command again"
            )
