"""A store that remembers what never changes: manifests, statements and moves.

Below a published manifest nothing is written again, and statements and moves have names that follow
from their bytes. So the second `list` of a registry asks only what there is, and reads what is new.
What is remembered is verified like what was just read.

    $ENGINESMITH_CACHE/registries/<16 hex of SHA-256(URL)>/<name>/<variant>/<version>.json
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.core.errors import CorruptError
from pipeline.core.values import FileDigest
from pipeline.registry.disk import read_bounded
from pipeline.registry.manifest import MANIFEST
from pipeline.registry.store import ENVELOPE, NONE_KNOWN, Place, RawStatement, Store

_MAX_FILE_BYTES = 64 << 20
_MOVES = "channels"
"""Where the moves of a variant are kept: no version is called like this."""


@dataclass(frozen=True, kw_only=True)
class RememberingStore:
    """`Store` over another one, for readers of many versions.

    Attributes:
        store: The other one.
        root: The cache of everything.
    """

    store: Store
    root: Path

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def public(self) -> bool:
        return self.store.public

    @property
    def local(self) -> bool:
        return self.store.local

    @cached_property
    def _identity(self) -> str | None:
        return self.store.identity()

    def identity(self) -> str | None:
        return self._identity

    def places(self, name: str | None = None, variant: str | None = None) -> list[Place]:
        return self.store.places(name, variant)

    def statement_names(
        self, name: str | None = None, variant: str | None = None
    ) -> dict[Place, tuple[str, ...]]:
        return self.store.statement_names(name, variant)

    def read_manifest(self, place: Place) -> bytes:
        kept = self._read(place)
        if MANIFEST not in kept:
            kept[MANIFEST] = self.store.read_manifest(place)
            self._keep(place, kept)
        return kept[MANIFEST]

    def open_file(
        self, place: Place, file: FileDigest, offset: int = 0, end: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        return self.store.open_file(place, file, offset, end)

    def read_statements(
        self, place: Place, names: Collection[str] | None = None
    ) -> list[RawStatement]:
        if names is None:
            return self.store.read_statements(place)
        kept = self._read(place)
        if missing := [name for name in names if name not in kept]:
            read = self.store.read_statements(place, missing)
            kept |= {one.name: one.envelope for one in read}
            self._keep(place, kept)
        return [
            RawStatement(name=name, files={ENVELOPE: kept[name]}) for name in names if name in kept
        ]

    def read_statement(self, place: Place, name: str) -> RawStatement:
        return self.store.read_statement(place, name)

    def read_moves(
        self, name: str, variant: str, known: Mapping[str, bytes] = NONE_KNOWN
    ) -> list[bytes]:
        place = Place(name=name, variant=variant, version=_MOVES)
        kept = self._read(place)
        found = self.store.read_moves(name, variant, kept | dict(known))
        now = {hashlib.sha256(data).hexdigest(): data for data in found}
        if now != kept:
            self._keep(place, now)
        return found

    def _path(self, place: Place) -> Path:
        registry = hashlib.sha256(self.store.url.encode()).hexdigest()[:16]
        folder = self.root / "registries" / registry / place.name / place.variant
        return folder / f"{place.version}.json"

    def _read(self, place: Place) -> dict[str, bytes]:
        """Name of a statement, SHA-256 of a move or `MANIFEST` -> its bytes."""
        with contextlib.suppress(CorruptError, ValueError, OSError, AttributeError):
            value = json.loads(read_bounded(self._path(place), _MAX_FILE_BYTES))
            return {name: text.encode() for name, text in value.items()}
        return {}

    def _keep(self, place: Place, kept: Mapping[str, bytes]) -> None:
        """Remember; what is no text, or cannot be written, is read again the next time."""
        path = self._path(place)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = json.dumps({name: data.decode() for name, data in kept.items()})
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            private = path.with_name(f".{path.name}-{os.urandom(8).hex()}")
            private.write_text(text)
            private.replace(path)
