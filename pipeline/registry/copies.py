"""Copies of what a variant lists, in one file: `{"<name>": "<text>", ...}`.

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
from collections.abc import Sequence
from typing import Protocol

from pipeline.core.errors import PipelineError
from pipeline.registry.store import MAX_COPIES_BYTES, Place, RawStatement, is_named_after

log = logging.getLogger(__name__)


class _Store(Protocol):
    @property
    def local(self) -> bool: ...

    def read_copies(self, name: str, variant: str) -> bytes | None: ...

    def put_copies(self, name: str, variant: str, data: bytes) -> None: ...


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


def add_copies(store: _Store, name: str, variant: str, copies: dict[str, bytes]) -> None:
    """Add to the copies of a variant, where the next `list` looks; nothing is lost if it fails."""
    if store.local:
        return
    try:
        known = unpack(store.read_copies(name, variant))
        store.put_copies(name, variant, pack({**known, **copies}))
    except PipelineError as error:
        log.debug("%s/%s has no new copies: %s", name, variant, error)
