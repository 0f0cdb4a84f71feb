"""What a registry lists of each variant, for `list` and `gc`, and copies of that in one file.

    {"<name>": "<text>", ...}

    <version>                 its manifest
    <version>/<statement>     an envelope
    move-<sha256>             a move

Each name ends in digits of the SHA-256 of its text, and without them a copy does not count, so it
does not matter who made it. Those who write into a variant add to its copies, and two at once may
lose one's; what has no copy is read where it lies. A reader keeps such a file in its cache.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pipeline.core.errors import PipelineError
from pipeline.registry.store import (
    MAX_MOVES,
    Place,
    RawStatement,
    Store,
    is_named_after,
    limit_dated,
    limit_kinds,
)

log = logging.getLogger(__name__)


MAX_COPIES_BYTES = 2 << 20
"""Of all copies of a variant: some 200 versions, the newest. What has no copy is read singly."""


@dataclass(frozen=True)
class Listed:
    """What a registry lists of a variant, unread: versions with names of statements, and moves.

    A move is named by digits (hex) that its SHA-256 begins with.
    """

    name: str
    variant: str
    versions: Mapping[Place, tuple[str, ...]]
    moves: tuple[str, ...]


@runtime_checkable
class ListedStore(Store, Protocol):
    """A store for readers of many versions."""

    def listed(self, name: str | None = None, variant: str | None = None) -> list[Listed]:
        """What there is of every variant of `places`, sorted; in a few requests for all of them."""

    def read_copies(self, name: str, variant: str) -> bytes | None:
        """Copies of what a variant lists; None if there are none."""

    def put_copies(self, name: str, variant: str, data: bytes) -> None:
        """Write copies of what a variant lists, in place of those that were there."""


def list_variants(
    url: str,
    statements: Mapping[Place, Iterable[tuple[float, str]]],
    moves: Mapping[tuple[str, str], Iterable[tuple[float, str]]],
) -> list[Listed]:
    """What a store lists, dated by it, by variant and within the limits."""
    found: dict[tuple[str, str], dict[Place, tuple[str, ...]]] = {}
    for place in sorted(statements):
        names = limit_kinds(statements[place], f"{url}: statements of {place}")
        found.setdefault((place.name, place.variant), {})[place] = tuple(names)
    kept = {
        of: tuple(limit_dated(moves.get(of, ()), MAX_MOVES, f"{url}: moves of {'/'.join(of)}"))
        for of in found
    }
    return [Listed(*of, versions, kept[of]) for of, versions in found.items()]


def unpack(data: bytes | None) -> dict[str, bytes]:
    """Name -> bytes of the copies that count; none of a file that is no such file."""
    try:
        found = {name: text.encode() for name, text in json.loads(data or "{}").items()}
    except (ValueError, RecursionError, AttributeError):
        return {}
    return {name: data for name, data in found.items() if is_named_after(name, data)}


def pack(copies: dict[str, bytes], limit_bytes: int = MAX_COPIES_BYTES) -> bytes:
    """The file of some copies: of those that are text, the last ones as far as they fit."""
    lines: list[str] = []
    for name, data in reversed(copies.items()):
        try:
            line = f"{json.dumps(name)}: {json.dumps(data.decode())}"
        except UnicodeDecodeError:
            continue
        limit_bytes -= len(line) + 2
        if limit_bytes < 4:
            break
        lines.append(line)
    return "{{\n{}\n}}\n".format(",\n".join(reversed(lines))).encode()


def copy_of(
    place: Place, statements: Sequence[RawStatement], manifest: bytes | None = None
) -> dict[str, bytes]:
    """Copies of what is published about a version."""
    found = {} if manifest is None else {place.version: manifest}
    return found | {f"{place.version}/{one.name}": one.envelope for one in statements}


def add_copies(store: ListedStore, name: str, variant: str, copies: dict[str, bytes]) -> None:
    """Add to the copies of a variant, where the next `list` looks; nothing is lost if it fails."""
    if store.local:
        return
    try:
        known = unpack(store.read_copies(name, variant))
        if not known.items() >= copies.items():
            store.put_copies(name, variant, pack({**known, **copies}))
    except PipelineError as error:
        log.debug("%s/%s has no new copies: %s", name, variant, error)
