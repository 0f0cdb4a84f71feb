"""The few things that a tree of named objects can do: a folder's files, a bucket's objects.

What a registry makes of them is written once, in `tree`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Protocol, TypeVar

from pipeline.core.values import FileDigest
from pipeline.registry.store import KINDS, MAX_PER_KIND, OnBytes, Store

log = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Found:
    """An object, unread.

    Attributes:
        key: Its key, relative to the registry.
        size_bytes: Its size.
        modified_s: When it was written, Unix time, by the store's clock.
    """

    key: str
    size_bytes: int
    modified_s: float


class Objects(Protocol):
    """Objects by key. Keys are relative to the registry; several threads may use it at once.

    Every method may raise AccessError (refused) and TransientError (try again).
    """

    @property
    def url(self) -> str:
        """Names the place in messages; no secrets."""
        ...

    def find(self, key: str) -> Found | None:
        """What is known of one object; None if there is none."""
        ...

    def listed(self, prefix: str) -> Iterator[Found]:
        """All objects whose key starts so; `prefix` is empty or ends in `/`."""
        ...

    def read(self, key: str, limit_bytes: int) -> bytes | None:
        """A small object; None if there is none.

        Raises:
            CorruptError: It is longer than `limit_bytes`; not read then.
        """
        ...

    def stream(
        self, key: str, offset: int, end: int | None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """The bytes of an object from `offset` on; see `Store.open_file`."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object unless its key is taken; whether this call has created it."""
        ...

    def replace(self, key: str, data: bytes) -> None:
        """Write a small object in place of what was there."""
        ...

    def put_file(self, key: str, source: Path, file: FileDigest, on_bytes: OnBytes) -> None:
        """Write a file of a package, hashed on its way, in place of what was there.

        Raises:
            CorruptError: It is not what `file` says, and nothing of it shows; or the store does
                not have it as it was sent.
        """
        ...

    def holds(self, key: str, source: Path, file: FileDigest) -> bool:
        """Whether a key holds a file's bytes: by size and by a checksum of the whole object."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects, those that are there."""
        ...

    def now_s(self) -> float:
        """Unix time by the clock that dates objects."""
        ...

    def unfinished(self, min_age_s: float, *, delete: bool) -> Iterator[str]:
        """What interrupted runs left that is no object, at least so old, in words."""
        ...

    def check_exclusive(self) -> None:
        """Write, and see that a second creation of the same name fails; leaves no trace.

        Raises:
            AccessError: Not writable, or not exclusively.
        """
        ...


def bounded(items: list[_Item], limit: int, what: str) -> list[_Item]:
    """At most `limit` items: the first half and the last half, with a warning that says so.

    Args:
        items: Sorted by age where the store dates them, so that neither what comes before nor what
            comes after can crowd an item out.
        limit: How many may stay.
        what: What they are, for the warning.
    """
    if len(items) <= limit:
        return items
    half = limit // 2
    log.warning(
        "%s: there are %d, only the %d oldest and newest are read; remove what is not yours",
        what,
        len(items),
        2 * half,
    )
    return [*items[:half], *items[-half:]]


def bounded_kinds(names: Iterable[str], what: str) -> list[str]:
    """At most `MAX_PER_KIND` statements of each kind, in the order of `KINDS`; see `bounded`."""
    of_kind: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name in names:
        of_kind[name.rpartition("-")[0]].append(name)
    kept = (bounded(of_kind[kind], MAX_PER_KIND, f"{what} ({kind})") for kind in KINDS)
    return [name for some in kept for name in some]


def readable(items: Iterable[_Item | None], what: str) -> list[_Item]:
    """Those that could be read; one warning counts the others."""
    found = list(items)
    kept = [item for item in found if item is not None]
    if len(kept) < len(found):
        log.warning("%s: %d cannot be read; skipped", what, len(found) - len(kept))
    return kept


def readers(store: Store) -> int:
    """How many threads read small objects of a store at once."""
    return 1 if store.local else 16


def in_parallel(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int = 16
) -> Iterator[_Result]:
    """`map`, by threads; after an error nothing more is begun, and Ctrl-C waits for no server.

    With one thread, the caller's own does the work: threads gain where a server is waited for, and
    lose where files of this machine are parsed.
    """
    if threads == 1:
        yield from map(function, items)
        return
    work = [(item, Future[_Result]()) for item in items]
    shared = iter(work)

    def run() -> None:
        for item, result in shared:
            if result.set_running_or_notify_cancel():
                try:
                    result.set_result(function(item))
                except BaseException as error:  # raised again where the result is asked for
                    result.set_exception(error)

    running = [Thread(target=run, daemon=True) for _ in range(min(threads, len(work)))]
    for thread in running:
        thread.start()
    try:
        for _, result in work:
            yield result.result()
    except KeyboardInterrupt:
        running.clear()  # they end with the process
        raise
    finally:
        for _, result in work:
            result.cancel()
        for thread in running:
            thread.join()
