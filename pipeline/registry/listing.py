"""What a registry has: every version with what was verified about it.

entries(store, terms)               # list: all of them, remembered where that may be
entry(store, "phi3:stable", terms)  # show: one
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pipeline.core.data import cache_root
from pipeline.core.errors import CorruptError, NotFoundError, UntrustedError
from pipeline.registry.disk import read_bounded
from pipeline.registry.manifest import MANIFEST
from pipeline.registry.resolve import examine, resolve
from pipeline.registry.store import (
    ENVELOPE,
    NONE_KNOWN,
    Place,
    RawStatement,
    Reader,
    Store,
    in_parallel,
    readers,
)
from pipeline.registry.trust.channels import read_channels
from pipeline.registry.trust.verification import Resolved, Terms

_MAX_FILE_BYTES = 64 << 20
_MOVES = "channels"
"""Where the moves of a variant are kept: no version is called like this."""


@dataclass(frozen=True, kw_only=True, order=True)
class Pointer:
    """A channel that points to a version, by its trusted log."""

    channel: str
    card: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One published version, with the channels that point to it.

    `resolved` is what was verified, of a yanked one, too; None if it cannot be used, and `fault`
    says why: damaged (`corrupt`), untrusted or revoked.
    """

    place: Place
    resolved: Resolved | None = None
    fault: str = ""
    corrupt: bool = False
    pointers: tuple[Pointer, ...] = ()


def entries(store: Store, terms: Terms) -> list[Entry]:
    """Every published version, by its place; those that were yanked, too."""
    reader = remembering(store)
    shown = replace(terms, allow_yanked=True)
    names = store.statement_names()
    places = sorted(names)
    pointers = _pointers(reader, places, terms)

    def look(place: Place) -> Entry | None:
        try:
            found = examine(reader, place, shown, names=names[place])
        except NotFoundError:
            return None  # removed meanwhile
        except (CorruptError, UntrustedError) as error:
            corrupt = isinstance(error, CorruptError)
            return Entry(place=place, fault=str(error), corrupt=corrupt)
        held = pointers.get((place, found.package.digest), ())
        return Entry(place=place, resolved=found, pointers=tuple(sorted(held)))

    return [one for one in in_parallel(look, places, readers(reader)) if one is not None]


def entry(store: Store, text: str, terms: Terms) -> Entry:
    """The one version that a reference means; see `resolve`. A yanked one is shown."""
    found = resolve(store, text, replace(terms, allow_yanked=True))
    held = _pointers(store, [found.place], terms).get((found.place, found.package.digest), ())
    return Entry(place=found.place, resolved=found, pointers=tuple(sorted(held)))


def _pointers(
    store: Reader, places: Iterable[Place], terms: Terms
) -> dict[tuple[Place, str], list[Pointer]]:
    """Place and digest -> channels that point there."""
    pointers: dict[tuple[Place, str], list[Pointer]] = {}
    for name, variant in dict.fromkeys((place.name, place.variant) for place in places):
        for channel in read_channels(store, terms.policy, name, variant):
            reference = channel.newest.reference
            pointer = Pointer(channel=channel.name, card=channel.card)
            pointers.setdefault((Place.of(reference), reference.digest), []).append(pointer)
    return pointers


@dataclass(frozen=True, kw_only=True)
class _RememberingStore:
    """A store that remembers what never changes, for readers of many versions.

    Below a published manifest nothing is written again, and statements and moves have names that
    follow from their bytes. So the second `list` of a registry asks only what there is, and reads
    what is new. What is remembered is verified like what was just read. It lies in the cache:

        registries/<16 hex of SHA-256(URL)>/<name>/<variant>/<version>.json
    """

    store: Store

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def local(self) -> bool:
        return self.store.local

    @cached_property
    def _identity(self) -> str | None:
        return self.store.identity()

    def identity(self) -> str | None:
        return self._identity

    def read_manifest(self, place: Place) -> bytes:
        kept = self._read(place)
        if MANIFEST not in kept:
            kept[MANIFEST] = self.store.read_manifest(place)
            self._keep(place, kept)
        return kept[MANIFEST]

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
        folder = cache_root() / "registries" / registry / place.name / place.variant
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


def remembering(store: Store) -> Reader:
    """To read many versions; a folder of this machine is read as fast as what is remembered."""
    return store if store.local else _RememberingStore(store=store)
