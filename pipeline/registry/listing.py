"""What a registry has: every version with what was verified about it.

entries(store, terms)               # list: all of them, remembered where that may be
entry(store, "phi3:stable", terms)  # show: one
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipeline.core.data import cache_root
from pipeline.core.errors import CorruptError, NotFoundError, UntrustedError
from pipeline.registry.client.remember import RememberingStore
from pipeline.registry.resolve import examine, resolve
from pipeline.registry.store import Place, Store, in_parallel, readers
from pipeline.registry.trust.channels import read_channels
from pipeline.registry.trust.verification import Resolved, Terms


@dataclass(frozen=True, kw_only=True, order=True)
class Pointer:
    """A channel that points to a version, by its trusted log."""

    channel: str
    card: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One published version.

    Attributes:
        place: Where it lies.
        resolved: What was verified; None if it cannot be used.
        fault: Why it cannot: damaged, untrusted or revoked; empty if it can. A yanked one can be
            shown, and is marked by `resolved.yank`.
        corrupt: The fault is damage.
        pointers: Channels that point to it.
    """

    place: Place
    resolved: Resolved | None = None
    fault: str = ""
    corrupt: bool = False
    pointers: tuple[Pointer, ...] = ()


def entries(store: Store, terms: Terms) -> list[Entry]:
    """Every published version, by its place.

    Those that were yanked, too.
    """
    if not store.local:  # a folder of this machine is read as fast as what is remembered of it
        store = RememberingStore(store=store, root=cache_root())
    shown = replace(terms, allow_yanked=True)
    names = store.statement_names()
    places = sorted(names)
    pointers = _pointers(store, places, terms)

    def look(place: Place) -> Entry | None:
        try:
            found = examine(store, place, shown, names=names[place])
        except NotFoundError:
            return None  # removed meanwhile
        except (CorruptError, UntrustedError) as error:
            corrupt = isinstance(error, CorruptError)
            return Entry(place=place, fault=str(error), corrupt=corrupt)
        held = pointers.get((place, found.package.digest), ())
        return Entry(place=place, resolved=found, pointers=tuple(sorted(held)))

    return [one for one in in_parallel(look, places, readers(store)) if one is not None]


def entry(store: Store, text: str, terms: Terms) -> Entry:
    """The one version that a reference means.

    Raises:
        PipelineError: As in `resolve`; a yanked version is shown.
    """
    found = resolve(store, text, replace(terms, allow_yanked=True))
    held = _pointers(store, [found.place], terms).get((found.place, found.package.digest), ())
    return Entry(place=found.place, resolved=found, pointers=tuple(sorted(held)))


def _pointers(
    store: Store, places: Iterable[Place], terms: Terms
) -> dict[tuple[Place, str], list[Pointer]]:
    """Place and digest -> channels that point there."""
    pointers: dict[tuple[Place, str], list[Pointer]] = {}
    for name, variant in dict.fromkeys((place.name, place.variant) for place in places):
        for channel in read_channels(store, terms.policy, name, variant):
            reference = channel.newest.reference
            pointer = Pointer(channel=channel.name, card=channel.card)
            pointers.setdefault((Place.of(reference), reference.digest), []).append(pointer)
    return pointers
