"""What every place that keeps packages can do, whatever its protocol.

A store moves bytes and creates names exclusively; it verifies nothing and decides nothing. Trust
(which statements and moves count), the client (which verifies every byte) and the channels lie
above it. A folder and a bucket hold the same tree:

    registry.json                                        identity of the registry
    <name>/<variant>/<version>/manifest.json             last to come, first to go
    <name>/<variant>/<version>/engine/...                files; never rewritten below a manifest
    <name>/<variant>/<version>.statements/<statement>/   statement.dsse.json and its attachments
    <name>/<variant>/<version>.lease                     while it is published, for gc
    <name>/<variant>/channels/log/<sha256>.dsse.json     moves
    <name>/<variant>/channels/<channel>.<card>.json      hint to the newest move, for people
    <name>/<variant>/copies.json                         manifests, statements, moves, in one file

An OCI registry holds the package as an image, statements as its referrers, moves as artifacts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import Thread
from typing import Protocol, TypeVar, runtime_checkable

from pipeline.core.errors import CorruptError, NotFoundError
from pipeline.core.published import FileDigest, Reference

log = logging.getLogger(__name__)

ENVELOPE = "statement.dsse.json"
"""The file of a statement that is signed; it names the SHA-256 of every other file."""
KINDS = ("yank", "signature", "provenance", "test")
"""Kinds of statements; where there are too many, the first kinds are read first."""
MAX_ENVELOPE_BYTES = 64 << 10
"""Of a statement; provenance has up to 40 KB."""
MAX_SMALL_BYTES = 8 << 10
"""Of any other statement, of a move and of an identity: ours have 2 to 6 KB. What is read at once
of rubbish is this, or the bound above, times the number of statements or moves."""
MAX_ATTACHMENT_BYTES = 32 << 20
"""Of one file beside an envelope; a report with its plots has 1 MB."""
MAX_PER_KIND = 1000
"""Statements of one kind and package that are read: half of them the oldest, half the newest by
the store's dates, so that neither what comes before nor what comes after crowds a statement out."""
MAX_MOVES = 10_000
"""Moves of one variant that are read; the same halves."""

OnBytes = Callable[[int], None]
"""Called with the number of bytes that were sent or received, from any thread; for progress."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_IDENTITY = re.compile(r"[0-9a-f]{32}")
_STATEMENT_NAME = re.compile(rf"(?:{'|'.join(KINDS)})-[0-9a-f]{{16}}")
_ATTACHMENT_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+){0,7}")


@dataclass(frozen=True, kw_only=True, order=True)
class Place:
    """One published version: recipe, variant of it, and the version that its manifest gives."""

    name: str
    variant: str
    version: str

    @classmethod
    def of(cls, reference: Reference) -> Place:
        return cls(name=reference.name, variant=reference.variant, version=reference.version)

    def __str__(self) -> str:
        return f"{self.name}/{self.variant}:{self.version}"


@dataclass(frozen=True, kw_only=True)
class RawStatement:
    """A statement as it lies in a store, unverified."""

    name: str  # `<kind>-<first 16 hex digits of SHA-256(envelope)>`; a claim until it is compared
    files: Mapping[str, bytes]  # `ENVELOPE`, which is signed, is always among them

    @property
    def kind(self) -> str:
        return self.name.rpartition("-")[0]

    @property
    def envelope(self) -> bytes:
        return self.files[ENVELOPE]


def is_statement_name(text: str) -> bool:
    """Whether a statement may have this name."""
    return _STATEMENT_NAME.fullmatch(text) is not None


def is_named_after(name: str, data: bytes) -> bool:
    """Whether a name ends in digits of the SHA-256 of `data`: a version, a statement, a move."""
    return hashlib.sha256(data).hexdigest().startswith(name.rpartition("-")[2])


def max_bytes(statement: str) -> int:
    """How long the envelope of a statement of this name may be."""
    return MAX_ENVELOPE_BYTES if statement.startswith("provenance-") else MAX_SMALL_BYTES


def is_attachment_name(text: str) -> bool:
    """Whether a file beside an envelope may have this name, such as `report.json`."""
    return text != ENVELOPE and _ATTACHMENT_NAME.fullmatch(text) is not None


class Reader(Protocol):
    """What verifying needs; any method may raise AccessError (refused) or TransientError."""

    @property
    def url(self) -> str:
        """Names it in messages; no secrets."""

    @property
    def local(self) -> bool:
        """Whether it is a folder of this machine: only there a local key counts."""

    def identity(self) -> str | None:
        """The registry's random identity, 32 hex digits; None if nothing was published yet.

        CorruptError if it cannot be read as one.
        """

    def read_manifest(self, place: Place) -> bytes:
        """The bytes of `manifest.json`.

        NotFoundError if there is no such version, CorruptError if they are more than may be.
        """

    def read_statements(
        self, place: Place, names: Collection[str] | None = None
    ) -> list[RawStatement]:
        """Statements about a version, or those with listed `names`: their envelopes only.

        What is too large, unreadable or beyond `MAX_PER_KIND` is skipped with one warning.
        """

    def read_moves(
        self, name: str, variant: str, names: Collection[str] | None = None
    ) -> list[bytes]:
        """The log of a variant's channels, or its moves with listed `names`: envelopes in no order.

        What is too large or beyond `MAX_MOVES` is skipped with one warning.
        """


@runtime_checkable
class Store(Reader, Protocol):
    """All that readers do."""

    @property
    def public(self) -> bool:
        """Whether anyone can read what is published here."""

    def places(self, name: str | None = None, variant: str | None = None) -> list[Place]:
        """All published versions, sorted; of one recipe, or of one variant of it."""

    def open_file(
        self, place: Place, file: FileDigest, offset: int = 0, end: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """The bytes of one file of a package from `offset` on, in chunks of the store's choice.

        Nothing is promised of them: there may be too few, too many or wrong ones. What lies from
        `end` on the caller will not read, so it need not be sent. NotFoundError if there is no such
        file; TransientError also while iterating, if the connection broke or is too slow.
        """

    def read_attachments(
        self, place: Place, name: str, files: Mapping[str, str]
    ) -> dict[str, bytes]:
        """Those of these files (name -> SHA-256 in hex) that lie beside a statement, unchecked.

        No other file there is looked at. CorruptError if one is larger than it may be.
        """


def parse_identity(data: bytes, origin: str) -> str:
    """The identity that a `registry.json` states; CorruptError if it states none."""
    try:
        value = json.loads(data)
        identity = value["id"]
        if value["schema"] == 1 and _IDENTITY.fullmatch(identity):
            return str(identity)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CorruptError(
        f"{origin} is not the identity of a registry, which moves and yanks name; restore it from "
        "a backup, or make a new registry and copy the packages there"
    )


def limit_dated(dated: Iterable[tuple[float, str]], limit: int, what: str) -> list[str]:
    """At most `limit` names, the oldest and the newest by the store's dates; warns of it."""
    names = [name for _, name in sorted(dated)]
    if len(names) <= limit:
        return names
    half = limit // 2
    fault = "%s: there are %d, only the %d oldest and newest are read; remove what is not yours"
    log.warning(fault, what, len(names), 2 * half)
    return [*names[:half], *names[-half:]]


def limit_kinds(dated: Iterable[tuple[float, str]], what: str) -> list[str]:
    """At most `MAX_PER_KIND` statements of each kind, in the order of `KINDS`."""
    of_kind: dict[str, list[tuple[float, str]]] = {kind: [] for kind in KINDS}
    for one in dated:
        of_kind[one[1].rpartition("-")[0]].append(one)
    kept = (limit_dated(of_kind[kind], MAX_PER_KIND, f"{what} ({kind})") for kind in KINDS)
    return [name for some in kept for name in some]


def read_each(
    read: Callable[[str], bytes | None], names: Iterable[str], what: str, threads: int = 16
) -> dict[str, bytes]:
    """What can be read under these names; one warning counts what is damaged or gone."""

    def attempt(name: str) -> bytes | None:
        try:
            return read(name)
        except (CorruptError, NotFoundError):
            return None

    wanted = list(names)
    found = zip(wanted, in_parallel(attempt, wanted, threads), strict=True)
    kept = {name: data for name, data in found if data is not None}
    if len(kept) < len(wanted):
        log.warning("%s: %d cannot be read; skipped", what, len(wanted) - len(kept))
    return kept


def readers(store: Reader) -> int:
    """How many threads read small objects of a store at once."""
    return 1 if store.local else 16


def in_parallel(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int = 16
) -> Iterator[_Result]:
    """`map`, by threads; after an error nothing more is begun, and Ctrl-C waits for no server.

    With one thread, the caller's own does the work: threads gain where a server is waited for, and
    lose where files of this machine are parsed.
    """
    work = [(item, Future[_Result]()) for item in items]
    if min(threads, len(work)) <= 1:
        yield from map(function, (item for item, _ in work))
        return
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
