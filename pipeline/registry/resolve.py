"""What a reference means, and what a registry has, verified.

    found = resolve(store, "phi3:stable", terms, card="NVIDIA-L4")      # exactly one
    found, refused = candidates(store, parse_reference("phi3"), terms)  # for select.py
    entries(store, terms)               # list: all of them, remembered where that may be
    entry(store, "phi3:stable", terms)  # show: one

All commands come through `examine`: the manifest is what its digest and its place say, its
signatures hold, and its yanks were asked for, before anything of it is loaded or shown.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pipeline.core.data import cache_root
from pipeline.core.errors import (
    CorruptError,
    Fault,
    NotFoundError,
    PipelineError,
    RecipeError,
    UntrustedError,
)
from pipeline.core.values import Package, Reference
from pipeline.registry.disk import read_bounded
from pipeline.registry.manifest import MANIFEST, manifest_at
from pipeline.registry.reference import ParsedReference, parse_reference
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
from pipeline.registry.trust.policy import TrustPolicy
from pipeline.registry.trust.verification import (
    Resolved,
    Terms,
    read_channels,
    require_usable,
    verify_statements,
    with_cards,
)

_MOST_LISTED = 8


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A version that a reference may mean, and that cannot be used: damaged, untrusted or gone."""

    what: str
    error: PipelineError


@dataclass(frozen=True, kw_only=True)
class _Offer:
    """A published version that a reference may mean; nothing of it is verified."""

    place: Place
    digest: str | None = None
    channel: str = ""
    cards: tuple[str, ...] = ()

    def __str__(self) -> str:
        return with_cards(self.place, self.cards)

    def examine(self, store: Store, terms: Terms) -> Resolved:
        found = examine(store, self.place, terms, self.digest)
        return replace(found, channel=self.channel, cards=self.cards)


def examine(
    store: Reader,
    place: Place,
    terms: Terms,
    digest: str | None = None,
    names: Collection[str] | None = None,
) -> Resolved:
    """Read and verify what a version says of itself, and what was stated about it.

    Its manifest must have the `digest`, if one is given; `names` are those of its statements, if
    the store was listed already.

    Raises:
        CorruptError: The manifest is damaged, or not the one that belongs there.
        UntrustedError: Revoked, yanked, or not signed by a trusted key.
        NotFoundError: No such version.
    """
    origin = f"{store.url} {place}"
    manifest, own = manifest_at(store, place)
    if digest not in {None, own}:
        raise CorruptError(
            f"{origin} has digest {own[:12]}, wanted {str(digest)[:12]}; publish it again"
        )
    package = Package(dir=Path(str(place)), manifest=manifest, digest=own)
    raws = store.read_statements(place, names)
    # Only a yank has to name the registry, so only for one is it asked.
    registry = store.identity() if any(raw.kind == "yank" for raw in raws) else None
    found = verify_statements(package, raws, terms.policy, registry=registry, origin=origin)
    require_usable(found, terms, origin)
    return found


def candidates(
    store: Store, wanted: ParsedReference, terms: Terms
) -> tuple[list[Resolved], list[Refused]]:
    """Every version that a reference may mean: those that may be used, and those that may not.

    A NotFoundError if there is none.
    """
    found: list[Resolved] = []
    refused: list[Refused] = []
    for offer in _offers(store, wanted, terms.policy, None):
        try:
            found.append(offer.examine(store, terms))
        except (CorruptError, UntrustedError, NotFoundError) as error:
            refused.append(Refused(what=str(offer.place), error=error))
    return found, refused


def resolve(store: Store, text: str, terms: Terms, card: str | None = None) -> Resolved:
    """The one package that a reference means; with a card, only its channels are followed.

    Raises:
        RecipeError: Not a reference, or several are meant; lists them.
        NotFoundError: There is none; says what there is.
        PipelineError: As in `examine`.
    """
    wanted = parse_reference(text)
    offers = _offers(store, wanted, terms.policy, card)
    if len(offers) > 1:
        choices = ", ".join(map(str, offers))
        raise RecipeError([Fault("", f"{wanted} is ambiguous: {choices}; specify one")])
    return offers[0].examine(store, terms)


def _offers(
    store: Store, wanted: ParsedReference, policy: TrustPolicy, card: str | None
) -> list[_Offer]:
    named = store.places(wanted.name)
    places = [place for place in named if wanted.variant in {None, place.variant}]
    there, missing = list(map(str, places or named)), f"{store.url} has no {wanted}"
    found: list[_Offer] = []
    if wanted.version is not None:
        found = [_Offer(place=place) for place in places if place.version == wanted.version]
    elif wanted.digest is not None:
        # A version ends in the first digits of its digest, so nothing is read to find it.
        found = [
            _Offer(place=place, digest=wanted.digest)
            for place in places
            if place.version.endswith(f"-{wanted.digest[:12]}")
        ]
    elif places:
        found, others = _channel_offers(store, wanted, places, policy, card)
        for_card = f" for {card}" if card else ""
        missing = f"{store.url}: no trusted move makes {wanted}{for_card} point anywhere"
        there = others or there
    if found:
        return found
    there = there or list(dict.fromkeys(place.name for place in store.places()))
    if not there:
        raise NotFoundError(
            f"{missing}; it is empty, so make one with `make engine MODEL={wanted.name}`"
        )
    more = len(there) - _MOST_LISTED
    listed = ", ".join(there[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
    raise NotFoundError(f"{missing}; there is {listed}")


def _channel_offers(
    store: Store,
    wanted: ParsedReference,
    places: Sequence[Place],
    policy: TrustPolicy,
    card: str | None,
) -> tuple[list[_Offer], list[str]]:
    cards: dict[Reference, list[str]] = {}
    others: list[str] = []
    for variant in dict.fromkeys(place.variant for place in places):
        for channel in read_channels(store, policy, wanted.name, variant):
            if channel.name == wanted.channel and card in {None, channel.card}:
                cards.setdefault(channel.newest.reference, []).append(channel.card)
            else:
                others.append(f"{wanted.name}/{variant}:{channel.name} of {channel.card}")
    offers = [
        _Offer(
            place=Place.of(reference),
            digest=reference.digest,
            channel=str(wanted.channel),
            cards=tuple(sorted(held)),
        )
        for reference, held in cards.items()
    ]
    return offers, others


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
