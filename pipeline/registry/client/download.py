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

from pipeline.core.errors import CorruptError, NotFoundError, PipelineError, TransientError
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
_LEAST_BYTES = 16 << 10
"""What an attempt must bring to count as progress: half a second's work of the slowest store that
`pipeline.registry.stores.transfer` lets pass. Else one that breaks at each byte holds a pull."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """How files are fetched.

    Attributes:
        jobs: Chunks on their way at once.
        chunk_bytes: Size of a chunk: one line of the record, one request, and what a kill can cost
            per job. With 16 MiB docker-registry took a quarter more of the processor than with 32
            (measured on 2026-11-29).
        tries: Attempts in a row that bring next to nothing, for one chunk.
        first_wait_s: Before the second attempt; doubled for each after it, 10 s at most.
    """

    jobs: int = 8
    chunk_bytes: int = 32 << 20
    tries: int = 6
    first_wait_s: float = 0.5

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

        With `fresh` the record begins anew.
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
            for worker in workers:
                while worker.is_alive():
                    worker.join(_TICK_S)
                    touch()
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
        """Fetch a chunk into its file; on from where an answer ended."""
        at, end = file.span(chunk)
        in_a_row = 0
        while True:
            before = at
            fault: PipelineError = CorruptError(
                f"{self.store.url}: {file.file.path} of {self.place} ends before byte {end}, its "
                f"manifest says {file.file.size_bytes}; publish it again, or pull another one"
            )
            try:
                # A generator: so a fault of our disk is not taken for one of the store's.
                with contextlib.closing(self._chunks(file, at, end)) as chunks:
                    for data in chunks:
                        file.write(data, at)
                        at += len(data)
                        self._report(len(data), fetched=len(data))
            except TransientError as error:
                fault = error
            if at == end:
                return
            in_a_row = 0 if at - before >= _LEAST_BYTES else in_a_row + 1
            if in_a_row >= self.transfer.tries:
                raise fault
            wait_s = self.transfer.wait_s(max(1, in_a_row))
            log.info("%s; going on from byte %d in %.1f s", fault, at, wait_s)
            if self._stop.wait(wait_s):
                raise _StoppedError

    def _chunks(self, file: LandingFile, at: int, end: int) -> Generator[memoryview, None, None]:
        """What the store sends from `at` on, to `end` at most.

        Raises:
            CorruptError: The file is not there.
        """
        try:
            with self.store.open_file(self.place, file.file, at, end) as chunks:
                while at < end and (data := next(chunks, None)) is not None:
                    if self._stop.is_set():
                        raise _StoppedError
                    view = memoryview(data)[: end - at]
                    at += len(view)
                    yield view
        except NotFoundError as error:
            raise CorruptError(f"{self.place} has no {file.file.path}: {error}") from error

    def _report(self, count: int, *, fetched: int) -> None:
        with self._changed:
            self._fetched_bytes += fetched
            self.on_bytes(count)
