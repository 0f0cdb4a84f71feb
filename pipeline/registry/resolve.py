"""What a reference means, verified: the one way from a text to a package that may be loaded.

    found = resolve(store, "phi3:stable", terms, card="NVIDIA-L4")      # exactly one
    found, refused = candidates(store, parse_reference("phi3"), terms)  # for select.py

All commands come through `examine`: the manifest is what its digest and its place say, its
signatures hold, and its yanks were asked for, before anything of it is loaded or shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.core.errors import (
    CorruptError,
    Fault,
    NotFoundError,
    PipelineError,
    RecipeError,
    UntrustedError,
)
from pipeline.core.published import Package, Reference
from pipeline.registry.manifest import manifest_at
from pipeline.registry.reference import ParsedReference, parse_reference
from pipeline.registry.store import Place, Reader, Store
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


Refused = tuple[str, PipelineError]
"""A version that a reference may mean, and why it cannot be used: damaged, untrusted or gone."""
_Offer = tuple[Place, str | None, tuple[str, ...]]
"""A published version that a reference may mean, its digest if that is known, and the cards whose
channel points to it; nothing of it is verified."""


def examine(
    store: Reader,
    place: Place,
    terms: Terms,
    digest: str | None = None,
    names: Collection[str] | None = None,
) -> Resolved:
    """Read and verify what a version says of itself, and what was stated about it.

    Its manifest must have the `digest`, if one is given; `names` are those of its statements, if
    the store was listed already. CorruptError if the manifest is damaged or not the one that
    belongs there, UntrustedError if it is revoked, yanked, or not signed by a trusted key.
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
            found.append(_examine(store, wanted, offer, terms))
        except (CorruptError, UntrustedError, NotFoundError) as error:
            error.__context__ = error.__cause__ = None  # they hold what was read
            refused.append((str(offer[0]), error.with_traceback(None)))
    return found, refused


def resolve(store: Store, text: str, terms: Terms, card: str | None = None) -> Resolved:
    """The one package that a reference means; with a card, only its channels are followed.

    RecipeError if it is no reference, or several are meant: lists them; NotFoundError says what
    there is; else raises like `examine`.
    """
    wanted = parse_reference(text)
    offers = _offers(store, wanted, terms.policy, card)
    if len(offers) > 1 and wanted.channel is None:
        # A version and a digest name one package; it is not where else others put its name.
        offers = [offer for offer in offers if _is_itself(store, offer)] or offers[:1]
    if len(offers) > 1:
        choices = ", ".join(with_cards(place, cards) for place, _, cards in offers)
        raise RecipeError([Fault("", f"{wanted} is ambiguous: {choices}; specify one")])
    return _examine(store, wanted, offers[0], terms)


def _examine(store: Store, wanted: ParsedReference, offer: _Offer, terms: Terms) -> Resolved:
    place, digest, cards = offer
    found = examine(store, place, terms, digest)
    return replace(found, channel=wanted.channel or "", cards=cards)


def _is_itself(store: Store, offer: _Offer) -> bool:
    """Whether the manifest there belongs there, and has the digest that is wanted."""
    with contextlib.suppress(CorruptError, NotFoundError):
        return offer[1] in {None, manifest_at(store, offer[0])[1]}
    return False


def _offers(
    store: Store, wanted: ParsedReference, policy: TrustPolicy, card: str | None
) -> list[_Offer]:
    named = store.places(wanted.name)
    places = [place for place in named if wanted.variant in {None, place.variant}]
    there, missing = list(map(str, places or named)), f"{store.url} has no {wanted}"
    found: list[_Offer] = []
    if wanted.version is not None:
        found = [(place, None, ()) for place in places if place.version == wanted.version]
    elif wanted.digest is not None:
        # A version ends in the first digits of its digest, so nothing is read to find it.
        end = f"-{wanted.digest[:12]}"
        found = [(place, wanted.digest, ()) for place in places if place.version.endswith(end)]
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
    offers: list[_Offer] = [
        (Place.of(one), one.digest, tuple(sorted(held))) for one, held in cards.items()
    ]
    return offers, others
