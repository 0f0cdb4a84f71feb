"""A reference, to the one published version that it means; channels by their verified logs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from pipeline.core.errors import CorruptError, NotFoundError
from pipeline.core.values import Reference
from pipeline.registry.lifecycle.channels import read_channels
from pipeline.registry.lookup import Shelf, choose, no_such_name
from pipeline.registry.manifest import digest_bytes
from pipeline.registry.reference import ParsedReference, parse_reference
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.statements import Pointer
from pipeline.registry.stores.store import Place, Store


def find(store: Store, policy: TrustPolicy, text: str, card: str | None = None) -> Reference:
    """What a reference means here, with the digest of what lies there.

    Args:
        store: Where to look.
        policy: Whose moves of channels count.
        text: What the user typed.
        card: Only channels of this card; None for all.

    Raises:
        RecipeError: Not a reference, or it may mean several; lists them.
        NotFoundError: It means none; says what there is.
        UntrustedError: It names a channel whose log cannot be believed.
    """
    wanted = parse_reference(text)
    variants = [
        variant for variant in variants_of(store, wanted) if wanted.variant in {None, variant}
    ]
    if wanted.digest is not None:
        return _with_digest(store, wanted, variants)
    moves = [
        move
        for variant in (variants if wanted.channel is not None else ())
        for move in read_channels(store, policy, wanted.name, variant)
    ]
    shelf = Shelf(
        name=wanted.name,
        versions={variant: store.versions(wanted.name, variant) for variant in variants},
        pointers=[
            Pointer(channel=move.channel, card=move.card, reference=move.reference, seq=move.seq)
            for move in moves
        ],
    )
    choice = choose(wanted, shelf, card)
    place = Place(name=wanted.name, variant=choice.variant, version=choice.version)
    digest = choice.digest or digest_bytes(store.read_manifest(place))
    return _reference(place, digest)


def variants_of(store: Store, wanted: ParsedReference) -> list[str]:
    """The variants that a name has.

    Raises:
        NotFoundError: None, or not the one that was asked for.
    """
    variants = store.variants(wanted.name)
    if not variants:
        raise no_such_name(wanted.name, store.names(), store.url)
    if wanted.variant is not None and wanted.variant not in variants:
        raise NotFoundError(
            f"{wanted.name} has no variant {wanted.variant}; it has {', '.join(variants)}"
        )
    return variants


def _with_digest(store: Store, wanted: ParsedReference, variants: Sequence[str]) -> Reference:
    for variant in variants:
        for version in store.versions(wanted.name, variant):
            place = Place(name=wanted.name, variant=variant, version=version)
            with contextlib.suppress(CorruptError, NotFoundError):  # damaged, or gone meanwhile
                if digest_bytes(store.read_manifest(place)) == wanted.digest:
                    return _reference(place, wanted.digest)
    raise NotFoundError(f"{store.url} has no package {wanted}; `enginesmith list` shows them all")


def _reference(place: Place, digest: str) -> Reference:
    return Reference(name=place.name, variant=place.variant, version=place.version, digest=digest)
