"""A reference, to the published versions that it may mean; once, so that nothing moves later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from pipeline.core.errors import CorruptError, NotFoundError
from pipeline.core.values import Reference
from pipeline.registry.lifecycle.pointers import pointers
from pipeline.registry.lookup import Shelf, choose, no_such_name
from pipeline.registry.manifest import digest_bytes
from pipeline.registry.reference import ParsedReference
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.stores.store import Place, Store


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A published version that a reference may mean; nothing of it is verified.

    Attributes:
        place: Where it lies.
        digest: What its manifest must have; None where a version alone names it.
        channel: The channel that points to it; empty if none was asked for.
        cards: Cards whose channel points to it.
    """

    place: Place
    digest: str | None = None
    channel: str = ""
    cards: tuple[str, ...] = ()


def offers(store: Store, wanted: ParsedReference, policy: TrustPolicy) -> list[Offer]:
    """Everything that a reference may mean, for any machine.

    Args:
        store: Where to look.
        wanted: The reference.
        policy: Whose moves of channels count.

    Raises:
        NotFoundError: Nothing; says what there is.
        UntrustedError: It names a channel whose log cannot be believed.
    """
    variants = store.variants(wanted.name)
    if not variants:
        raise no_such_name(wanted.name, store.names(), store.url)
    asked = [variant for variant in variants if wanted.variant in {None, variant}]
    found = [offer for variant in asked for offer in _offers_of(store, wanted, variant, policy)]
    if not found:
        _raise_nothing(store, wanted, variants, policy)
    return found


def _offers_of(
    store: Store, wanted: ParsedReference, variant: str, policy: TrustPolicy
) -> Iterator[Offer]:
    if wanted.channel is not None:
        cards: dict[Reference, list[str]] = {}
        for pointer in pointers(store, policy, wanted.name, variant, wanted.channel):
            if pointer.channel == wanted.channel:
                cards.setdefault(pointer.reference, []).append(pointer.card)
        for reference, held in cards.items():
            yield Offer(
                place=Place.of(reference),
                digest=reference.digest,
                channel=wanted.channel,
                cards=tuple(sorted(held)),
            )
        return
    for version in store.versions(wanted.name, variant):
        place = Place(name=wanted.name, variant=variant, version=version)
        if wanted.version == version:
            yield Offer(place=place)
        elif wanted.digest is not None and _digest_at(store, place) == wanted.digest:
            yield Offer(place=place, digest=wanted.digest)


def _digest_at(store: Store, place: Place) -> str | None:
    try:
        return digest_bytes(store.read_manifest(place))
    except (CorruptError, NotFoundError):  # another version's damage is not ours
        return None


def _raise_nothing(
    store: Store, wanted: ParsedReference, variants: list[str], policy: TrustPolicy
) -> NoReturn:
    """Say what there is instead."""
    if wanted.digest is None:
        choose(
            wanted,
            Shelf(
                name=wanted.name,
                versions={one: store.versions(wanted.name, one) for one in variants},
                pointers=[
                    found
                    for one in variants
                    for found in pointers(store, policy, wanted.name, one, wanted.channel)
                ],
            ),
        )
    raise NotFoundError(f"{store.url} has no {wanted}; see what it has with enginesmith list")
