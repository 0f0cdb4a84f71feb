"""Every version of a registry: list what there is, and remove what nothing needs any more.

    entries(store, terms)                           # list: remembered where that may be
    entry(store, "phi3:stable", terms)              # show: one
    collect(store, policy, keep_days=30)            # gc: only looks; removes with delete=True

A version stays if any of these holds:

- a channel points to it, or did before its last change, so that it can be rolled back;
- a trusted key signed something about it in the last `keep_days`: published, tested or yanked it;
- no trusted key signed anything about it: then nothing tells how old it is;
- it is damaged: a person should look at it first (`damaged` lets it go, unless a channel needs it).

Each version is looked at again right before it is removed. That takes the manifest only; a later
collection takes the files, a day after that at the earliest, so that a reader who is at it goes on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from pipeline.core.errors import AccessError, CorruptError, NotFoundError, UntrustedError
from pipeline.core.ownership import CACHE, make_own, require_unshared
from pipeline.core.settings import cache_root
from pipeline.registry.disk import read_bounded
from pipeline.registry.resolve import examine, resolve
from pipeline.registry.store import (
    ENVELOPE,
    Place,
    RawStatement,
    Reader,
    Store,
    in_parallel,
    is_named_after,
    readers,
)
from pipeline.registry.stores.publication import (
    Listed,
    WritableStore,
    add_copies,
    copy_of,
    pack,
    unpack,
)
from pipeline.registry.trust.policy import TrustPolicy
from pipeline.registry.trust.verification import Channel, Resolved, Terms, read_channels

log = logging.getLogger(__name__)

DAY_S = 24 * 3600.0
GRACE_S = DAY_S
"""Longer than any publication, from the first statement to the move of the channel: uploading an
engine takes minutes, and accepting one takes hours at most."""
_MAX_HELD_BYTES = 16 << 20
"""Of a variant: some 1,000 versions. One with more is read singly, and not kept."""
_FEW_STATEMENTS, _FEW_MOVES = 64, 1000  # that are read before they are verified
_VARIANTS_AT_ONCE, _READS_AT_ONCE = 4, 4

_Result = TypeVar("_Result")


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
    channels: tuple[Channel, ...] = ()


def entries(store: WritableStore, terms: Terms) -> list[Entry]:
    """Every published version, by its place; those that were yanked, too."""
    shown = replace(terms, allow_yanked=True)

    def look(listed: Listed, reader: Reader) -> list[Entry]:
        channels = read_channels(reader, terms.policy, listed.name, listed.variant)
        found = []
        for place, names in listed.versions.items():
            try:
                one = examine(reader, place, shown, names=names)
            except NotFoundError:
                continue  # removed meanwhile
            except (CorruptError, UntrustedError) as error:
                corrupt = isinstance(error, CorruptError)
                found.append(Entry(place=place, fault=str(error), corrupt=corrupt))
            else:
                found.append(Entry(place=place, resolved=one, channels=_pointing(one, channels)))
        return found

    return [one for some in _of_variants(store, look) for one in some]


def entry(store: Store, text: str, terms: Terms) -> Entry:
    """The one version that a reference means; see `resolve`. A yanked one is shown."""
    found = resolve(store, text, replace(terms, allow_yanked=True))
    channels = read_channels(store, terms.policy, found.place.name, found.place.variant)
    return Entry(place=found.place, resolved=found, channels=_pointing(found, channels))


def _pointing(found: Resolved, channels: Iterable[Channel]) -> tuple[Channel, ...]:
    """The channels that point to a package."""
    return tuple(one for one in channels if one.newest.reference == found.reference)


def _of_variants(
    store: WritableStore, look: Callable[[Listed, Reader], _Result]
) -> Iterator[_Result]:
    """Look at every variant; at what a store that is far away has, through what is remembered."""
    identity, alone = functools.cache(store.identity), threading.Lock()

    def at(listed: Listed) -> _Result:
        if store.local:  # read as fast as what is remembered
            return look(listed, store)
        if (held := _read_all(store, listed, alone)) is None:
            with alone:
                return look(listed, store)
        return look(listed, _Held(store, store.url, store.local, listed, held, identity))

    return in_parallel(at, store.listed(), 1 if store.local else _VARIANTS_AT_ONCE)


@dataclass(frozen=True)
class _Held:
    """What a variant lists, read: under names that follow from bytes, which nothing can change.

    So the second `list` of a registry asks only what there is, and reads what is new. What is
    remembered is verified like what was just read.
    """

    store: Store
    url: str
    local: bool
    listed: Listed
    held: dict[str, bytes]
    identity: Callable[[], str | None]

    def read_manifest(self, place: Place) -> bytes:
        data = self.held.get(place.version)
        return self.store.read_manifest(place) if data is None else data

    def read_statements(
        self, place: Place, names: Collection[str] | None = None
    ) -> list[RawStatement]:
        found = ((name, self.held.get(f"{place.version}/{name}")) for name in names or ())
        return [RawStatement(name=name, files={ENVELOPE: data}) for name, data in found if data]

    def read_moves(
        self, name: str, variant: str, names: Collection[str] | None = None
    ) -> list[bytes]:
        return [data for one in self.listed.moves if (data := self.held.get(f"move-{one}"))]


def _read_all(
    store: WritableStore, listed: Listed, alone: threading.Lock
) -> dict[str, bytes] | None:
    """All that a variant lists, named as its copies: from the cache, the copies, or singly.

    None if that is more than may be held. What takes most memory is done `alone`.
    """
    of_version = {
        place: [place.version, *(f"{place.version}/{name}" for name in names)]
        for place, names in listed.versions.items()
    }
    moves = [f"move-{name}" for name in listed.moves]
    wanted = [*moves, *(name for names in of_version.values() for name in names)]
    registry = hashlib.sha256(store.url.encode()).hexdigest()[:16]
    path = cache_root() / "registries" / registry / listed.name / f"{listed.variant}.json"
    remembered: dict[str, bytes] = {}
    with alone, contextlib.suppress(AccessError, CorruptError, OSError):
        require_unshared(path, CACHE)
        remembered = unpack(read_bounded(path, _MAX_HELD_BYTES))
    held, room = dict(remembered), _MAX_HELD_BYTES
    if sum(name not in held for name in wanted) > 1:
        with contextlib.suppress(CorruptError, AccessError):
            held = unpack(store.read_copies(listed.name, listed.variant)) | held

    def read(place: Place) -> dict[str, bytes]:
        nonlocal room
        missing = [name for name in of_version[place] if name not in held]
        if len(missing) > _FEW_STATEMENTS:
            room = 0
        if room <= 0:
            return {}
        statements = [name.partition("/")[2] for name in missing if "/" in name]
        found = copy_of(place, store.read_statements(place, statements) if statements else ())
        if place.version in missing:
            with contextlib.suppress(CorruptError, NotFoundError):  # its reader hears of it
                found[place.version] = store.read_manifest(place)
        room -= sum(map(len, found.values()))
        return found

    missing = [name.removeprefix("move-") for name in moves if name not in held]
    if len(missing) > _FEW_MOVES:
        return None
    if missing:
        for data in store.read_moves(listed.name, listed.variant, missing):
            held[f"move-{hashlib.sha256(data).hexdigest()[: len(missing[0])]}"] = data
    lacking = [place for place, names in of_version.items() if not held.keys() >= set(names)]
    for found in list(in_parallel(read, lacking, _READS_AT_ONCE)):
        held |= found
    if room <= 0:
        return None
    held = {name: held[name] for name in wanted if name in held}
    with alone:
        _remember(path, remembered, held)
    return held


def _remember(path: Path, known: Mapping[str, bytes], held: Mapping[str, bytes]) -> None:
    """Keep what has a name of its own bytes; what cannot be kept is read again the next time."""
    true = {name: data for name, data in held.items() if is_named_after(name, data)}
    if true.keys() == known.keys():
        return
    with contextlib.suppress(AccessError, OSError):
        make_own(path.parent, CACHE)
        private = path.with_name(f".{path.name}-{os.urandom(8).hex()}")
        private.write_bytes(pack(true, _MAX_HELD_BYTES))
        private.replace(path)


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
    store: WritableStore,
    policy: TrustPolicy,
    *,
    keep_days: float = 30.0,
    damaged: bool = False,
    delete: bool = False,
) -> Collected:
    """Decide about every version, see the module; remove those that may go if `delete` says so."""
    leftovers = store.leftovers(GRACE_S, delete=delete)  # first: not what goes in this run
    keep_s = max(keep_days * DAY_S, GRACE_S)
    decide = functools.partial(_decide, policy, store.now_s(), keep_s, damaged)
    crowded = False

    def look(listed: Listed, reader: Reader) -> list[Fate | None]:
        nonlocal crowded
        crowded = crowded or reader is store
        if delete and isinstance(reader, _Held):  # what two writers at once lost is there again
            add_copies(store, listed.name, listed.variant, reader.held)
        needed = _needed(reader, policy, listed.name, listed.variant)
        return [decide(reader, needed, one, names) for one, names in listed.versions.items()]

    found = _of_variants(store, look)
    fates = [fate for some in found for fate in some if fate is not None]

    def remove(fate: Fate) -> tuple[Fate, int | None]:
        """Look again, now, and remove; gives the bytes that this frees, None if it stays."""
        place = fate.place
        again = decide(store, _needed(store, policy, place.name, place.variant), place)
        if again is None or not again.remove:
            return again or fate, None
        log.info("Removing %s: %s", place, again.why)
        return again, store.delete_package(place)

    going = [fate for fate in fates if fate.remove and delete]
    threads = 1 if crowded else readers(store)
    done = {fate.place: (fate, freed) for fate, freed in in_parallel(remove, going, threads)}
    return Collected(
        fates=tuple(done[fate.place][0] if fate.place in done else fate for fate in fates),
        leftovers=tuple(leftovers),
        removed=tuple(place for place, (_, freed) in done.items() if freed is not None),
        freed_bytes=sum(freed or 0 for _, freed in done.values()),
    )


def _needed(store: Reader, policy: TrustPolicy, name: str, variant: str) -> dict[Place, str]:
    """The versions that a channel of a variant points to, or did before its last change; why."""
    needed: dict[Place, str] = {}
    for channel in read_channels(store, policy, name, variant):
        places = dict.fromkeys(Place.of(move.reference) for move in reversed(channel.moves))
        of = f"{channel.name} of {channel.card}"
        for place, when in zip(places, ("points to it", "pointed to it before"), strict=False):
            if place == Place.of(channel.newest.reference) or place not in needed:
                needed[place] = f"{of} {when}"
    return needed


def _decide(
    policy: TrustPolicy,
    now_s: float,
    keep_s: float,
    damaged: bool,
    store: Reader,
    needed: Mapping[Place, str],
    place: Place,
    names: Collection[str] | None = None,
) -> Fate | None:
    if place in needed:
        return Fate(place=place, remove=False, why=needed[place])
    try:
        terms = Terms(policy=policy, allow_unsigned=True, allow_yanked=True)
        found = examine(store, place, terms, names=names)
    except NotFoundError:
        return None
    except (CorruptError, UntrustedError) as error:
        why = str(error) if damaged else f"look at it, or pass --damaged: {error}"
        return Fate(place=place, remove=damaged, why=why)
    size_bytes = found.package.size_bytes
    if not found.statements:
        why = "no trusted key signed anything about it, so nothing tells how old it is"
        return Fate(place=place, remove=False, why=why, size_bytes=size_bytes)
    signed_s = datetime.fromisoformat(found.statements[0].signed_at).timestamp()
    age_s = max(now_s - signed_s, 0.0)
    remove, days = age_s > keep_s, age_s / DAY_S
    why = f"something was signed about it {days:.1f} days ago"
    if remove:
        why = f"no channel needs it, and the last statement about it is {days:.0f} days old"
    return Fate(place=place, remove=remove, why=why, size_bytes=size_bytes)
