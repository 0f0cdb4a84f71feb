"""Fetch the files of a package: chunks in parallel, resumed, every byte verified.

A record in the work folder names the chunks that landed, so that a killed pull goes on from them.
Threads fetch while the caller's takes the SHA-256 of file after file, which can only be taken in
order: it reads the bytes back from the page cache. A file that is wrong as a whole is fetched once
more, in case bytes were damaged on their way; wrong again, it is wrong in the registry. Not a byte
more than the manifest says is written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import random
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import CorruptError, NotFoundError, PipelineError, TransientError
from pipeline.core.published import FileDigest
from pipeline.core.workfolder import WorkFolder
from pipeline.registry.disk import disk_errors, read_bounded
from pipeline.registry.store import OnBytes, Place, Store

log = logging.getLogger(__name__)

PACKAGE = "package"
"""Folder in the work folder that the files land in."""
RECORD = "landed"
_LANDED = b"x"
_MAX_RECORD_BYTES = 64 << 20
_AHEAD = 16
"""Chunks that may land before the one that the hash is at: 512 MiB, which the page cache of a
machine that serves models holds, and what a kill can cost where disk and network are faster than
the hash."""
CHUNK_BYTES = 32 << 20
"""One mark in the record, one request, and what a kill can cost per job. With 16 MiB
docker-registry took a quarter more of the processor than with 32 (measured on 2026-11-29)."""
TRIES = 6
"""Attempts in a row that bring next to nothing, for one chunk."""
FIRST_WAIT_S = 0.5
"""Before the second attempt; doubled for each after it, 10 s at most. Between half and all of it,
by chance: clients that were dropped together come back apart."""
_READ_BYTES = 1 << 20
_TICK_S = 1.0
_STOP_WAIT_S = 10.0
_LEAST_BYTES = 16 << 10
"""What an attempt must bring to count as progress: half a second's work of the slowest store that
`pipeline.registry.stores.transfer` lets pass. Else one that breaks at each byte holds a pull."""


@dataclass(kw_only=True)
class _File:
    """A file whose chunks land at `path`; an empty file has one, which is empty.

    `first` is the number of its first chunk among all of the package, `there` the chunks that
    landed, in an earlier run too.
    """

    file: FileDigest
    path: Path
    first: int
    there: set[int] = field(default_factory=set)

    @property
    def chunks(self) -> int:
        return max(1, -(-self.file.size_bytes // CHUNK_BYTES))

    def span(self, chunk: int) -> tuple[int, int]:
        start = chunk * CHUNK_BYTES
        return start, min(start + CHUNK_BYTES, self.file.size_bytes)

    @contextlib.contextmanager
    def open(self) -> Iterator[int]:
        """A descriptor; the file has its full size, so that chunks can be written anywhere."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(
            self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            os.ftruncate(descriptor, self.file.size_bytes)
            yield descriptor
        finally:
            os.close(descriptor)

    def hash(self, chunk: int, digest: hashlib._Hash) -> None:
        """Take the bytes of a chunk into a digest, as they lie in the file."""
        buffer = memoryview(bytearray(_READ_BYTES))
        at, end = self.span(chunk)
        with self.open() as descriptor:
            while at < end:
                count = os.preadv(descriptor, [buffer[: end - at]], at)
                if not count:
                    raise CorruptError(f"{self.path} was shortened while it was fetched")
                digest.update(buffer[:count])
                at += count


def download(
    store: Store,
    place: Place,
    files: Sequence[FileDigest],
    work: WorkFolder,
    digest: str,
    jobs: int,
    on_bytes: OnBytes,
) -> int:
    """Fetch all files of a package into `work.dir / PACKAGE`; how many bytes the store sent.

    `files` are what its verified manifest lists, whose SHA-256 is `digest`. What `work` already has
    of them is hashed and kept. `jobs` chunks are on their way at once. `on_bytes` gets numbers of
    bytes that are there, fetched or found, and negative ones where a file is fetched again.
    CorruptError if a file is not what the manifest says, also when fetched again; TransientError if
    the store failed too often or is too slow, or the disk is full.
    """
    folder, first = work.dir / PACKAGE, 0
    landing: list[_File] = []
    with disk_errors(f"write {work.dir.parent}"), contextlib.ExitStack() as closing:
        head = f"{digest} {CHUNK_BYTES}\n".encode()
        landed = _landed(work.dir / RECORD, head)
        for file in files:
            one = _File(file=file, path=folder / file.path, first=first)
            one.there = {chunk for chunk in range(one.chunks) if first + chunk in landed}
            landing.append(one)
            first += one.chunks
        there = sum(end - start for one in landing for start, end in map(one.span, one.there))
        on_bytes(there)
        require_room(work.dir, sum(file.size_bytes for file in files) - there)
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        record = os.open(work.dir / RECORD, flags if landed else flags | os.O_TRUNC, 0o600)
        closing.callback(os.close, record)
        os.pwrite(record, head, 0)
        folder.mkdir(mode=0o755, exist_ok=True)
        run = _Download(
            store=store,
            place=place,
            jobs=jobs,
            mark=lambda number: os.pwrite(record, _LANDED, len(head) + number),
            on_bytes=on_bytes,
            files=landing,
        )
        return run.run(work.touch)


def _landed(record: Path, head: bytes) -> set[int]:
    """Numbers of the chunks that an earlier run fetched; none if the record is of others.

    A record has a head, then one byte for each chunk of the package.
    """
    with contextlib.suppress(CorruptError):
        data = read_bounded(record, _MAX_RECORD_BYTES)
        if data.startswith(head):
            marks = data.removeprefix(head)
            return {number for number, mark in enumerate(marks) if mark == _LANDED[0]}
    return set()


def require_room(folder: Path, needed_bytes: int) -> None:
    """Demand that so much is free where a folder lies."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise TransientError(
            f"disk full: the package needs {needed_bytes / 1e9:.2f} GB in {folder}, "
            f"{free_bytes / 1e9:.2f} GB are free; free some and run the same command again"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _StoppedError(Exception):
    """Another thread failed, or the user stopped us."""


@dataclass(kw_only=True)
class _Download:
    store: Store
    place: Place
    jobs: int
    mark: Callable[[int], object]
    on_bytes: OnBytes
    files: Sequence[_File]
    _queue: deque[tuple[_File, int]] = field(default_factory=deque)
    _hashing: int = 0  # number of the chunk that the hash is at
    _fetched_bytes: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _stop: threading.Event = field(default_factory=threading.Event)
    _errors: list[BaseException] = field(default_factory=list)

    def run(self, touch: Callable[[], None]) -> int:
        chunks = ((file, chunk) for file in self.files for chunk in range(file.chunks))
        self._queue.extend((file, chunk) for file, chunk in chunks if chunk not in file.there)
        # Daemons: a store that hangs must not keep the process alive after Ctrl-C.
        workers = [
            threading.Thread(target=self._work, name=f"pull-{number}", daemon=True)
            for number in range(max(1, min(self.jobs, len(self._queue))))
        ]
        for worker in workers:
            worker.start()
        try:
            for file in self.files:
                self._verify(file, touch)
        finally:
            self._stop.set()
            with self._changed:
                self._changed.notify_all()
            ends_s = time.monotonic() + _STOP_WAIT_S
            for worker in workers:
                worker.join(max(0.0, ends_s - time.monotonic()))
        return self._fetched_bytes

    def _verify(self, file: _File, touch: Callable[[], None]) -> None:
        for again in (False, True):
            sha256 = self._hash(file, touch)
            if sha256 == file.file.sha256:
                return
            fault = (
                f"{self.store.url}: {file.file.path} of {self.place} has SHA-256 {sha256}, "
                f"its manifest says {file.file.sha256}"
            )
            if not again:
                log.warning("%s; fetching it once more", fault)
                with self._changed:
                    self.on_bytes(-file.file.size_bytes)
                    file.there, self._hashing = set(), file.first
                    self._queue.extendleft((file, n) for n in reversed(range(file.chunks)))
                    self._changed.notify_all()
        raise CorruptError(f"{fault}; nothing was kept. Publish it again, or pull another one")

    def _hash(self, file: _File, touch: Callable[[], None]) -> str:
        digest = hashlib.sha256()
        for chunk in range(file.chunks):
            with self._changed:
                self._hashing = file.first + chunk
                self._changed.notify_all()
                while chunk not in file.there:
                    if self._errors:
                        raise self._errors[0]
                    self._changed.wait(_TICK_S)
                    touch()
            touch()
            file.hash(chunk, digest)
        return digest.hexdigest()

    def _work(self) -> None:
        try:
            while (task := self._next()) is not None:
                file, chunk = task
                with file.open() as descriptor:
                    self._fetch(file.file, descriptor, *file.span(chunk))
                    # All at once at the end took a fifth of the time of 1 GB (2026-11-30).
                    os.fsync(descriptor)
                self.mark(file.first + chunk)
                with self._changed:
                    file.there.add(chunk)
                    self._changed.notify_all()
        except _StoppedError:
            return
        except BaseException as error:
            with self._changed:
                self._errors.append(error)
                self._stop.set()
                self._changed.notify_all()

    def _next(self) -> tuple[_File, int] | None:
        """The next chunk, not too far ahead of the hash; None when all is done.

        The chunk that the hash waits for was handed out before, so waiting ends.
        """
        ahead = max(_AHEAD, 2 * self.jobs)
        with self._changed:
            while not self._stop.is_set():
                if self._queue:
                    file, chunk = self._queue[0]
                    if file.first + chunk < self._hashing + ahead:
                        return self._queue.popleft()
                self._changed.wait()
        return None

    def _fetch(self, file: FileDigest, descriptor: int, at: int, end: int) -> None:
        in_a_row = 0
        while at < end:
            before = at
            fault: PipelineError = CorruptError(
                f"{self.store.url}: {file.path} of {self.place} ends before byte {end}, its "
                f"manifest says {file.size_bytes}; publish it again, or pull another one"
            )
            try:
                # A generator: so a fault of our disk is not taken for one of the store's.
                with contextlib.closing(self._pieces(file, at, end)) as pieces:
                    for data in pieces:
                        while data:
                            count = os.pwrite(descriptor, data, at)
                            data, at = data[count:], at + count
                            with self._changed:
                                self._fetched_bytes += count
                                self.on_bytes(count)
            except TransientError as error:
                fault = error
            if at == end:
                return
            in_a_row = 0 if at - before >= _LEAST_BYTES else in_a_row + 1
            if in_a_row >= TRIES:
                raise fault
            wait_s = min(10.0, FIRST_WAIT_S * 2 ** max(0, in_a_row - 1))
            wait_s *= random.uniform(0.5, 1.0)
            log.info("%s; going on from byte %d in %.1f s", fault, at, wait_s)
            if self._stop.wait(wait_s):
                raise _StoppedError

    def _pieces(self, file: FileDigest, at: int, end: int) -> Generator[memoryview, None, None]:
        try:
            with self.store.open_file(self.place, file, at, end) as pieces:
                while at < end and (data := next(pieces, None)) is not None:
                    if self._stop.is_set():
                        raise _StoppedError
                    view = memoryview(data)[: end - at]
                    at += len(view)
                    yield view
        except NotFoundError as error:
            raise CorruptError(f"{self.place} has no {file.path}: {error}") from error
