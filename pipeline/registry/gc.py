"""Remove versions that nothing needs any more.

    collect(store, policy, Rules(keep_days=30))                  # only looks
    collect(store, policy, Rules(keep_days=30), delete=True)

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

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from pipeline.core.errors import CorruptError, NotFoundError, UntrustedError
from pipeline.registry.resolve import examine, remembering
from pipeline.registry.store import Place, Reader, in_parallel, readers
from pipeline.registry.stores.publication import WritableStore
from pipeline.registry.trust.policy import TrustPolicy
from pipeline.registry.trust.verification import Terms, read_channels

log = logging.getLogger(__name__)

DAY_S = 24 * 3600.0
GRACE_S = DAY_S
"""Longer than any publication, from the first statement to the move of the channel: uploading an
engine takes minutes, and accepting one takes hours at most."""


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
