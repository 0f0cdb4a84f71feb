"""Every version of a registry: list what there is, and remove what nothing needs any more.

    entries(store, terms)                           # list: remembered where that may be
    entry(store, "phi3:stable", terms)              # show: one
    collect(store, policy, Rules(keep_days=30))     # gc: only looks; removes with delete=True

A version stays if any of these holds:

- a channel points to it, or did before its last change (`history` packages of each channel);
- a trusted key signed something about it in the last `keep_days`: published, tested or yanked it;
- `pins` name it;
- no trusted key signed anything about it: then nothing tells how old it is;
- it is damaged: a person should look at it first (`damaged` lets it go, unless a channel needs it).

Each version is looked at again right before it is removed. That takes the manifest only; a later
collection takes the files, a day after that at the earliest, so that a reader who is at it goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path

from pipeline.core.errors import CorruptError, NotFoundError, UntrustedError
from pipeline.core.settings import cache_root
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
from pipeline.registry.stores.publication import WritableStore
from pipeline.registry.trust.policy import TrustPolicy
from pipeline.registry.trust.verification import Resolved, Terms, read_channels

log = logging.getLogger(__name__)

DAY_S = 24 * 3600.0
GRACE_S = DAY_S
"""Longer than any publication, from the first statement to the move of the channel: uploading an
engine takes minutes, and accepting one takes hours at most."""
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


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What stays; see the module. `history` of 1 is the package that a channel points to."""

    keep_days: float = 30.0
    history: int = 2
    pins: frozenset[Place] = frozenset()
    damaged: bool = False


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What is to become of one version, and why; size None if its manifest was not read."""

    place: Place
    remove: bool
    why: str
    size_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What was found, and done; a later collection frees the bytes."""

    fates: tuple[Fate, ...]
    leftovers: tuple[str, ...]
    removed: tuple[Place, ...] = ()
    freed_bytes: int = 0


def collect(
    store: WritableStore, policy: TrustPolicy, rules: Rules, *, delete: bool = False
) -> Collected:
    """Decide about every version, and remove those that may go if `delete` says so."""
    leftovers = store.leftovers(GRACE_S, delete=delete)  # first: not what goes in this run
    # Looking once reads many versions, and most of it never changes.
    reader = remembering(store)
    names = store.statement_names()
    variants = dict.fromkeys((place.name, place.variant) for place in sorted(names))
    needed: dict[Place, str] = {}
    for name, variant in variants:
        needed |= _needed(reader, policy, name, variant, rules.history)
    now_s = store.now_s()

    def look(place: Place) -> Fate | None:
        return _decide(reader, policy, rules, now_s, place, needed, names[place])

    found = in_parallel(look, sorted(names), readers(reader))
    fates = [fate for fate in found if fate is not None]
    removed: list[Place] = []
    freed_bytes = 0
    for number, fate in enumerate(fates):
        if not (fate.remove and delete):
            continue
        place = fate.place
        needed = _needed(store, policy, place.name, place.variant, rules.history)
        again = _decide(store, policy, rules, now_s, place, needed)
        if again is not None:
            fates[number] = again
            if again.remove:
                freed_bytes += store.delete_package(place)
                removed.append(place)
                log.info("Removed %s: %s", place, again.why)
    return Collected(
        fates=tuple(fates),
        leftovers=tuple(leftovers),
        removed=tuple(removed),
        freed_bytes=freed_bytes,
    )


def _needed(
    store: Reader, policy: TrustPolicy, name: str, variant: str, history: int
) -> dict[Place, str]:
    needed: dict[Place, str] = {}
    for channel in read_channels(store, policy, name, variant):
        packages = dict.fromkeys(move.reference for move in reversed(channel.moves))
        for number, reference in enumerate(list(packages)[:history]):
            when = "points to it" if number == 0 else "pointed to it before"
            reason = f"{channel.name} of {channel.card} {when}"
            if number == 0 or Place.of(reference) not in needed:
                needed[Place.of(reference)] = reason
    return needed


def _decide(
    store: Reader,
    policy: TrustPolicy,
    rules: Rules,
    now_s: float,
    place: Place,
    needed: Mapping[Place, str],
    names: Collection[str] | None = None,
) -> Fate | None:
    if place in needed or place in rules.pins:
        return Fate(place=place, remove=False, why=needed.get(place, "--keep names it"))
    try:
        terms = Terms(policy=policy, allow_unsigned=True, allow_yanked=True)
        found = examine(store, place, terms, names=names)
    except NotFoundError:
        return None
    except (CorruptError, UntrustedError) as error:
        why = str(error) if rules.damaged else f"look at it, or pass --damaged: {error}"
        return Fate(place=place, remove=rules.damaged, why=why)
    size_bytes = sum(file["size"] for file in found.package.manifest["files"])
    statements = found.statements
    if not statements:
        why = "no trusted key signed anything about it, so nothing tells how old it is"
        return Fate(place=place, remove=False, why=why, size_bytes=size_bytes)
    signed_s = datetime.fromisoformat(statements[0].signed_at).timestamp()
    days = max(now_s - signed_s, 0.0) / DAY_S
    remove = days * DAY_S > max(rules.keep_days * DAY_S, GRACE_S)
    why = f"no channel needs it, and the last statement about it is {days:.0f} days old"
    if not remove:
        why = f"something was signed about it {days:.1f} days ago"
    return Fate(place=place, remove=remove, why=why, size_bytes=size_bytes)
