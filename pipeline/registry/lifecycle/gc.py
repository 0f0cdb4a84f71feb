"""Remove versions that nothing needs any more.

A version stays if any of these holds:

- a channel points to it, or did before its last change (`history` packages of each channel);
- an unsigned pointer names it, in a registry from before there was a log;
- somebody said something about it in the last `keep_days`: published, accepted or yanked it. So a
  new statement of any kind is a lease, too;
- `--keep` names it;
- a channel log of its variant cannot be believed: then nobody knows what that log needs;
- nothing tells how old it is;
- it is damaged: a person should look at it first (`--damaged` lets it go as any other).

Everything is judged once, to show it, and each version again right before it is removed: channels
and statements are read anew. What is left is the moment between that look and the removal; a
promotion that falls into it finds its target gone and says so.

Never touched, however the options are: what is younger than `GRACE_S`.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.core.errors import CorruptError, NotFoundError, RecipeError
from pipeline.core.values import Reference
from pipeline.registry.lifecycle.channels import Log, read_logs
from pipeline.registry.lifecycle.evidence import manifest_at
from pipeline.registry.reference import check_part
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.stores.store import Place, Store, WritableStore

log = logging.getLogger(__name__)

DAY_S = 24 * 3600.0
GRACE_S = DAY_S
"""Longer than any publication, from the first statement to the move of the channel: uploading an
engine takes minutes, and accepting one takes hours at most."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What stays.

    Attributes:
        keep_days: Versions of which something was said since; in days, from 0 on.
        history: Packages of each channel: 1 is the one that it points to, 2 also the one before.
        pins: Versions that stay whatever else is so.
        damaged: Damaged ones are judged like others.
    """

    keep_days: float = 30.0
    history: int = 2
    pins: frozenset[Place] = frozenset()
    damaged: bool = False

    @property
    def min_age_s(self) -> float:
        """How long ago the last word about a version must be."""
        return max(self.keep_days * DAY_S, GRACE_S)


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What is to become of one version.

    Attributes:
        place: The version.
        remove: Whether it goes.
        why: In words.
        size_bytes: Of its engine files; None if its manifest cannot be read.
        age_s: Since something was last said about it; None if nothing tells.
        damage: Why it is damaged; empty if it is not.
    """

    place: Place
    remove: bool
    why: str
    size_bytes: int | None
    age_s: float | None
    damage: str = ""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What was found, and done.

    Attributes:
        fates: Of every version, in order of their places; of the last look at each.
        leftovers: Of interrupted runs, in words.
        faults: Channel logs that cannot be believed.
        removed: What is gone now.
        freed_bytes: By that.
    """

    fates: tuple[Fate, ...]
    leftovers: tuple[str, ...]
    faults: tuple[str, ...]
    removed: tuple[Place, ...] = ()
    freed_bytes: int = 0


def collect(
    store: WritableStore, policy: TrustPolicy, rules: Rules, *, delete: bool = False
) -> Collected:
    """Judge every version, and remove those that may go if `delete` says so.

    Args:
        store: Where they lie.
        policy: Whose moves of channels count.
        rules: What stays.
        delete: False only looks.

    Raises:
        AccessError: Not readable, or not writable.
        TransientError: The connection broke; what is gone is gone, and the rest is as it was.
    """
    now_s = store.now_s()
    fates: list[Fate] = []
    faults: list[str] = []
    removed: list[Place] = []
    freed_bytes = 0
    for name in store.names():
        for variant in store.variants(name):
            roots = _roots(store, policy, name, variant, rules)
            faults += roots.faults
            for version in store.versions(name, variant):
                place = Place(name=name, variant=variant, version=version)
                with contextlib.suppress(NotFoundError):  # somebody else removed it
                    fate = _judge(store, place, roots, rules, now_s)
                    if fate.remove and delete:
                        again = _roots(store, policy, name, variant, rules)
                        fate = _judge(store, place, again, rules, now_s)
                    fates.append(fate)
                    if fate.remove and delete:
                        freed_bytes += store.delete_version(place)
                        removed.append(place)
                        log.info("Removed %s: %s", place, fate.why)
    return Collected(
        fates=tuple(fates),
        leftovers=tuple(store.leftovers(GRACE_S, delete=delete)),
        faults=tuple(faults),
        removed=tuple(removed),
        freed_bytes=freed_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class _Roots:
    """Why versions of one variant are needed: version -> reason, and faults that keep them all."""

    needed: Mapping[str, str]
    faults: Sequence[str]


def _roots(store: Store, policy: TrustPolicy, name: str, variant: str, rules: Rules) -> _Roots:
    logs = read_logs(store, policy, name, variant)
    needed: dict[str, str] = {}
    logged = {f"{held.channel}.{held.card}.json" for held in logs}
    for file, data in store.channels(name, variant).items():
        if file not in logged and (version := pointed_to(data)):
            needed[version] = f"{file.removesuffix('.json')} points to it, unsigned"
    for held in logs:
        for number, reference in enumerate(_history(held, rules.history)):
            when = "points to it" if number == 0 else "pointed to it before"
            reason = f"{held.channel} of {held.card} {when}"
            if number == 0 or reference.version not in needed:
                needed[reference.version] = reason
    faults = [str(held.fault) for held in logs if held.fault is not None]
    return _Roots(needed=needed, faults=faults)


def _history(held: Log, count: int) -> Iterator[Reference]:
    """The last packages that a channel pointed to, the newest first, each once."""
    seen = dict.fromkeys(move.reference for move in reversed(held.moves))
    yield from list(seen)[:count]


def pointed_to(data: bytes) -> str:
    """The version that a pointer names, whoever wrote it; empty if it names none."""
    try:
        return check_part("version", json.loads(data)["version"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RecipeError):
        return ""


def _judge(store: Store, place: Place, roots: _Roots, rules: Rules, now_s: float) -> Fate:
    size_bytes, damage = None, ""
    try:
        manifest, _ = manifest_at(store, place)
        size_bytes = sum(file["size"] for file in manifest["files"])
    except CorruptError as error:
        damage = str(error)
    told = [stored.made_s for stored in store.statements(place)]
    age_s = now_s - max(told) if told else None
    keep = _reason_to_keep(place, roots, rules, age_s, damage)
    days = "" if age_s is None else f"; the last word about it is {age_s / DAY_S:.0f} days old"
    return Fate(
        place=place,
        remove=not keep,
        why=keep or f"no channel needs it{days}",
        size_bytes=size_bytes,
        age_s=age_s,
        damage=damage,
    )


def _reason_to_keep(
    place: Place, roots: _Roots, rules: Rules, age_s: float | None, damage: str
) -> str:
    if reason := roots.needed.get(place.version):
        return reason
    if roots.faults:
        return "a channel log of its variant cannot be believed"
    if place in rules.pins:
        return "--keep names it"
    if age_s is None:
        return "no statement tells how old it is"
    if age_s < rules.min_age_s:
        return f"something was said about it {max(age_s, 0.0) / DAY_S:.1f} days ago"
    if damage and not rules.damaged:
        return f"it is damaged, and --damaged was not said: {damage}"
    return ""
