"""Fetch the files of a package: pieces in parallel, resumed, every byte verified.

A broken or short answer is tried again from the byte that it reached; no permission and no digest
is. A file that is wrong as a whole is fetched once more, in case the bytes were hurt on their way;
wrong again, it is wrong in the registry. Not a byte more than the manifest says is written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.errors import CorruptError, NotFoundError, TransientError
from pipeline.core.values import FileDigest
from pipeline.registry.client.owned import Owned
from pipeline.registry.client.pieces import WINDOW_BYTES, Journal, JournalWriter, LandingFile
from pipeline.registry.client.retry import Retry
from pipeline.registry.disk import disk_errors
from pipeline.registry.stores.store import Place, Store

log = logging.getLogger(__name__)

PIECE_BYTES = 32 << 20
"""One line of the journal, and what a kill can cost per job. Small, since at the end of a file the
hash has yet to catch up with the pieces that landed together; but each is a request: with 16 MiB
docker-registry took a quarter more of the processor (measured on 2026-11-29)."""
PACKAGE = "package"
"""Folder in the private folder that the files land in."""
_ENDS = 3
"""Answers in a row that end at the same byte without a fault, until a file counts as too short."""
_TOUCH_EVERY_S = 1.0
_STOP_WAIT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """How files are fetched.

    Attributes:
        jobs: Pieces on their way at once.
        piece_bytes: Size of a piece.
        retry: How long to insist.
    """

    jobs: int = 8
    piece_bytes: int = PIECE_BYTES
    retry: Retry = field(default_factory=Retry)


def files_of(manifest: Mapping[str, Any]) -> list[FileDigest]:
    """The files that a checked manifest lists."""
    entries = manifest["files"]
    return [
        FileDigest(path=entry["path"], size_bytes=entry["size"], sha256=entry["sha256"])
        for entry in entries
    ]


def landed_bytes(files: Sequence[FileDigest], owned: Owned, digest: str, transfer: Transfer) -> int:
    """Bytes that an earlier run left in a private folder."""
    journal = Journal(folder=owned.dir, digest=digest, piece_bytes=transfer.piece_bytes)
    count = 0
    for number, pieces in (journal.read() or {}).items():
        if number < len(files):
            for piece in pieces:
                left = files[number].size_bytes - piece * transfer.piece_bytes
                count += max(0, min(transfer.piece_bytes, left))
    return count


def download(
    store: Store,
    place: Place,
    files: Sequence[FileDigest],
    owned: Owned,
    digest: str,
    transfer: Transfer,
    on_bytes: Callable[[int], None],
) -> int:
    """Fetch all files of a package into `owned.dir / PACKAGE`.

    Args:
        store: Where they lie.
        place: The version.
        files: What its verified manifest lists.
        owned: A private folder; what it already has of this package is verified and kept.
        digest: Of the package.
        transfer: How.
        on_bytes: Called with numbers of bytes that are there, fetched or found, for progress.

    Returns:
        How many bytes the store sent.

    Raises:
        CorruptError: A file is not what the manifest says, also when fetched again.
        TransientError: The store failed too often, or the disk is full.
        AccessError: The store refuses, or the folder is not writable.
    """
    journal = Journal(folder=owned.dir, digest=digest, piece_bytes=transfer.piece_bytes)
    with disk_errors(f"write {owned.dir.parent}"), journal.writing() as writer:
        landed = journal.read() or {}
        run = _Download(
            store=store,
            place=place,
            transfer=transfer,
            journal=writer,
            landed=landed,
            on_bytes=on_bytes,
            files=[
                LandingFile(
                    number=number,
                    file=file,
                    path=owned.dir / PACKAGE / file.path,
                    piece_bytes=transfer.piece_bytes,
                    kept=dict(landed.get(number, {})),
                )
                for number, file in enumerate(files)
            ],
        )
        return run.run(owned.touch)


class _StoppedError(Exception):
    """Another thread failed, or the user stopped us."""


@dataclass(kw_only=True)
class _Download:
    store: Store
    place: Place
    transfer: Transfer
    journal: JournalWriter
    landed: Mapping[int, Mapping[int, str]]
    on_bytes: Callable[[int], None]
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
        self._queue.extend((file, piece) for file in self.files for piece in range(file.pieces))
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
                    worker.join(_TOUCH_EVERY_S)
                    touch()
        finally:
            self._halt()
            for worker in workers:
                worker.join(_STOP_WAIT_S)
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
        """The next piece, not too far ahead of its file's hash; None when all is done.

        The piece that a hash waits for was handed out before, so waiting ends.
        """
        with self._changed:
            while not self._stop.is_set() and self._open:
                if self._queue:
                    file, piece = self._queue[0]
                    ahead = (piece - file.hashed) * self.transfer.piece_bytes
                    if ahead < WINDOW_BYTES or piece == file.hashed:
                        return self._queue.popleft()
                self._changed.wait()
        return None

    def _land(self, file: LandingFile, piece: int) -> None:
        file.open()
        if piece in file.kept:
            self._report(file.piece_size(piece), fetched=0)
        else:
            self._fetch(file, piece)

        def refetch(damaged: int) -> None:
            self._report(-file.piece_size(damaged), fetched=0)
            self._fetch(file, damaged)

        if file.take(piece, refetch, lambda hashed: self._hashed(file, hashed)):
            self._finish(file)

    def _hashed(self, file: LandingFile, piece: int) -> None:
        if self.landed.get(file.number, {}).get(piece) != file.sha256:
            self.journal.landed(file.number, piece, file.sha256)
        with self._changed:
            self._changed.notify_all()
        if self._stop.is_set():
            raise _StoppedError

    def _finish(self, file: LandingFile) -> None:
        """All pieces of a file are there: it is right, or fetched once more."""
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
        with self._changed:
            self._queue.extendleft((file, piece) for piece in reversed(range(file.pieces)))
            self._changed.notify_all()

    def _fetch(self, file: LandingFile, piece: int) -> None:
        """Fetch a piece into its file, on its way to the disk."""
        retry = self.transfer.retry
        at, end = file.span(piece)
        in_a_row = ended_in_a_row = 0  # attempts without a new byte; those of them without a fault
        for attempt in range(1, retry.tries_of_piece + 1):
            before = at
            fault: TransientError | None = None
            try:
                # A generator: so a fault of our disk is not taken for one of the store's.
                with contextlib.closing(self._chunks(file, at, end)) as chunks:
                    for chunk in chunks:
                        self._write(file.open(), chunk, at)
                        at += len(chunk)
                        self._report(len(chunk), fetched=len(chunk))
                if at == end:
                    file.flush(piece)
                    return
            except TransientError as error:
                fault = error
            in_a_row = 0 if at > before else in_a_row + 1
            ended_in_a_row = 0 if at > before or fault else ended_in_a_row + 1
            self._require_longer(file, at, ended_in_a_row)
            said = fault or TransientError(
                f"{self.store.url} sent {file.file.path} only up to byte {at} of "
                f"{file.file.size_bytes}; run the same command again"
            )
            if in_a_row >= retry.tries or attempt == retry.tries_of_piece:
                raise said
            wait_s = retry.delay_s(max(1, in_a_row))
            log.info("%s; going on from byte %d in %.1f s", said, at, wait_s)
            if self._stop.wait(wait_s):
                raise _StoppedError
        raise AssertionError("the loop returns or raises")

    def _require_longer(self, file: LandingFile, at: int, ended_in_a_row: int) -> None:
        """A file that ends at the same byte again and again, without any fault, is too short."""
        if ended_in_a_row >= _ENDS:
            raise CorruptError(
                f"{self.store.url}: {file.file.path} of {self.place} ends at byte {at}, its "
                f"manifest says {file.file.size_bytes}; nothing was kept. Publish it again, or "
                "pull another one"
            )

    def _chunks(self, file: LandingFile, at: int, end: int) -> Generator[memoryview, None, None]:
        """What the store sends from `at` on, cut at `end`.

        Raises:
            CorruptError: The file goes on where it must end, or is not there.
            NotFoundError: The whole version is not there any more.
        """
        last = end == file.file.size_bytes
        try:
            with self.store.open_file(self.place, file.file, at, None if last else end) as chunks:
                for chunk in chunks:
                    if self._stop.is_set():
                        raise _StoppedError
                    view = memoryview(chunk)[: end - at]
                    at += len(view)
                    if view:
                        yield view
                    if last and len(chunk) > len(view):
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

    def _require_version(self, cause: Exception) -> None:
        """A file may be missing since the whole version went: pullers have no lease on it."""
        try:
            self.store.read_manifest(self.place)
        except NotFoundError:
            raise NotFoundError(
                f"{self.place} was removed from {self.store.url} while it was fetched; pull again "
                "for what the channel points to now"
            ) from cause

    @staticmethod
    def _write(descriptor: int, chunk: memoryview, at: int) -> None:
        while chunk:
            count = os.pwrite(descriptor, chunk, at)
            chunk, at = chunk[count:], at + count

    def _report(self, count: int, *, fetched: int) -> None:
        with self._changed:
            self._fetched_bytes += fetched
            self.on_bytes(count)
