"""What a reference means, verified: the one way from a text to a package that may be loaded.

    found = resolve(store, "phi3:stable", terms, card="NVIDIA-L4")      # exactly one
    found, refused = candidates(store, parse_reference("phi3"), terms)  # for select.py

`pull`, `verify`, `generate`, `serve`, `accept`, `promote`, `copy`, `list` and `show` all come
through `examine`: the manifest is what its digest and its place say, its signatures hold, and its
yanks were asked for, before anything of it is loaded or shown.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.core.errors import (
    CorruptError,
    Fault,
    NotFoundError,
    PipelineError,
    RecipeError,
    UntrustedError,
)
from pipeline.core.values import Package, Reference
from pipeline.registry.manifest import manifest_at, manifest_bytes
from pipeline.registry.reference import ParsedReference, parse_reference, reference_of
from pipeline.registry.store import Place, RawStatement, Store
from pipeline.registry.trust.channels import read_channels
from pipeline.registry.trust.policy import TrustPolicy
from pipeline.registry.trust.verification import (
    Verification,
    Yank,
    require_usable,
    verify_statements,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a reader accepts.

    Attributes:
        policy: Whom it trusts.
        allow_unsigned: Take what no trusted key signed.
        allow_yanked: Take what was yanked. A command allows that only for a reference by digest.
    """

    policy: TrustPolicy
    allow_unsigned: bool = False
    allow_yanked: bool = False


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A package whose manifest and statements were verified; its files were not read.

    Attributes:
        place: Where it lies.
        package: Manifest and digest; its folder is `place` as text for a package of a store.
        statements: Those that count, as they lie in the store; envelopes, perhaps without files.
        verification: What they say.
        channel: The channel that was followed; empty for none.
        cards: Cards whose channel points here.
    """

    place: Place
    package: Package
    statements: tuple[RawStatement, ...]
    verification: Verification
    channel: str = ""
    cards: tuple[str, ...] = ()

    @property
    def data(self) -> bytes:
        """The bytes of the manifest: only canonical ones were let in."""
        return manifest_bytes(self.package.manifest)

    @property
    def yank(self) -> Yank | None:
        """The yank that counts; None if there is none."""
        return self.verification.yank

    def __str__(self) -> str:
        return _shown(self.place, self.cards)

    @property
    def reference(self) -> Reference:
        """The package, by its digest."""
        return reference_of(self.package)


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
        return _shown(self.place, self.cards)


def examine(
    store: Store,
    place: Place,
    terms: Terms,
    digest: str | None = None,
    names: Collection[str] | None = None,
) -> Resolved:
    """Read and verify what a version says of itself, and what was stated about it.

    Args:
        store: Where it lies.
        place: The version.
        terms: What is accepted.
        digest: What its manifest must have; None for any.
        names: Of the statements about it, from a listing of the store; None lists them.

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
    return examine_package(package, raws, terms, origin, registry)


def examine_package(
    package: Package,
    raws: Sequence[RawStatement],
    terms: Terms,
    origin: str,
    registry: str | None = None,
) -> Resolved:
    """Verify what was stated about a package whose manifest is what its digest says.

    Args:
        package: From a store, or in a folder.
        raws: The statements about it, as they lie there.
        terms: What is accepted.
        origin: The package, for messages.
        registry: Identity of the registry; None for a folder that belongs to none.

    Raises:
        UntrustedError: As in `examine`.
    """
    done = verify_statements(package, raws, terms.policy, registry=registry, origin=origin)
    require_usable(
        done,
        terms.policy,
        origin=origin,
        allow_unsigned=terms.allow_unsigned,
        allow_yanked=terms.allow_yanked,
    )
    trusted = {one.name for one in done.statements}
    return Resolved(
        place=Place.of(reference_of(package)),
        package=package,
        statements=tuple(raw for raw in raws if raw.name in trusted),
        verification=done,
    )


def candidates(
    store: Store, wanted: ParsedReference, terms: Terms
) -> tuple[list[Resolved], list[Refused]]:
    """Every version that a reference may mean, for any machine.

    Returns:
        Those that may be used, and those that may not with the reason.

    Raises:
        NotFoundError: There is none; says what there is.
    """
    found: list[Resolved] = []
    refused: list[Refused] = []
    for offer in _offers(store, wanted, terms.policy, None):
        try:
            one = examine(store, offer.place, terms, offer.digest)
        except (CorruptError, UntrustedError, NotFoundError) as error:
            refused.append(Refused(what=str(offer.place), error=error))
        else:
            found.append(replace(one, channel=offer.channel, cards=offer.cards))
    return found, refused


def resolve(store: Store, text: str, terms: Terms, card: str | None = None) -> Resolved:
    """The one package that a reference means.

    With a card, only channels of that card are followed.

    Raises:
        RecipeError: Not a reference, or several are meant; lists them.
        NotFoundError: There is none; says what there is.
        CorruptError: As in `examine`, like
        UntrustedError: this.
    """
    wanted = parse_reference(text)
    offers = _offers(store, wanted, terms.policy, card)
    if len(offers) > 1:
        choices = ", ".join(map(str, offers))
        raise RecipeError([Fault("", f"{wanted} is ambiguous: {choices}; specify one")])
    (offer,) = offers
    found = examine(store, offer.place, terms, offer.digest)
    return replace(found, channel=offer.channel, cards=offer.cards)


def published_build(
    store: Store, name: str, variant: str, build_key: str, terms: Terms, card: str
) -> Resolved | None:
    """The published package of a build key that stands for all of that key; None if there is none.

    Of those that are verified and not yanked, the one that this card's `candidate` points to, else
    the latest by trusted provenance.

    Raises:
        UntrustedError: There are some, and all that a trusted key signed were yanked.
    """
    found: list[Resolved] = []
    yanked: UntrustedError | None = None
    for place in store.places(name, variant):
        if f"-{build_key[:8]}-" not in place.version:
            continue
        try:
            one = examine(store, place, replace(terms, allow_yanked=True))
        except (CorruptError, UntrustedError, NotFoundError) as error:
            log.warning("%s does not stand for this build: %s", place, error)
            continue
        if one.package.manifest["build_key"] != build_key:
            continue
        if one.yank is None:
            found.append(one)
        else:
            yanked = UntrustedError(
                f"{place} was yanked {one.yank}; this recipe would build the same again, so "
                "nothing is built. Change the recipe, take the yank back with enginesmith yank "
                f"{place} --undo --registry {store.url}, or build once more with --rebuild"
            )
    if not found:
        if yanked is not None:
            raise yanked
        return None
    channels = read_channels(store, terms.policy, name, variant, "candidate")
    pointed = {one.newest.reference.digest for one in channels if one.card == card}
    return max(found, key=lambda one: (one.package.digest in pointed, one.verification.built_at))


def _offers(
    store: Store, wanted: ParsedReference, policy: TrustPolicy, card: str | None
) -> list[_Offer]:
    """The published versions that a reference may mean; at least one.

    Raises:
        NotFoundError: None; says what there is.
    """
    everything = store.places(wanted.name)
    if not everything:
        raise _no_such_name(store, wanted.name)
    places = [place for place in everything if wanted.variant in {None, place.variant}]
    if not places:
        variants = ", ".join(dict.fromkeys(place.variant for place in everything))
        raise NotFoundError(f"{wanted.name} has no variant {wanted.variant}; it has {variants}")
    if wanted.channel is not None:
        return _channel_offers(store, wanted, places, policy, card)
    if wanted.version is not None:
        found = [_Offer(place=place) for place in places if place.version == wanted.version]
    else:
        digest = str(wanted.digest)
        # A version ends in the first digits of its digest, so nothing is read to find it.
        found = [
            _Offer(place=place, digest=digest)
            for place in places
            if place.version.endswith(f"-{digest[:12]}")
        ]
    if not found:
        near = difflib.get_close_matches(str(wanted), [str(place) for place in places], n=3)
        raise NotFoundError(f"there is no {wanted}; there is {_listed(near or places)}")
    return found


def _channel_offers(
    store: Store,
    wanted: ParsedReference,
    places: Sequence[Place],
    policy: TrustPolicy,
    card: str | None,
) -> list[_Offer]:
    cards: dict[Reference, list[str]] = {}
    others: list[str] = []
    for variant in dict.fromkeys(place.variant for place in places):
        for channel in read_channels(store, policy, wanted.name, variant):
            if channel.name == wanted.channel and card in {None, channel.card}:
                cards.setdefault(channel.newest.reference, []).append(channel.card)
            else:
                others.append(f"{wanted.name}/{variant}:{channel.name} of {channel.card}")
    if not cards:
        for_card = f" for {card}" if card else ""
        raise NotFoundError(
            f"no trusted move makes {wanted}{for_card} point anywhere; "
            f"there is {_listed(others or places)}"
        )
    return [
        _Offer(
            place=Place.of(reference),
            digest=reference.digest,
            channel=str(wanted.channel),
            cards=tuple(sorted(held)),
        )
        for reference, held in cards.items()
    ]


def _shown(place: Place, cards: Sequence[str]) -> str:
    return f"{place} ({', '.join(cards)})" if cards else str(place)


def _no_such_name(store: Store, name: str) -> NotFoundError:
    names = list(dict.fromkeys(place.name for place in store.places()))
    if close := difflib.get_close_matches(name, names, n=3):
        hint = f"did you mean {_listed(close)}?"
    elif names:
        hint = f"it has {_listed(names)}"
    else:
        hint = f"it is empty; make one with `make engine MODEL={name}`"
    return NotFoundError(f"{store.url} has no {name}; {hint}")


def _listed(items: Iterable[object], most: int = 8) -> str:
    texts = [str(item) for item in items]
    shown = ", ".join(texts[:most])
    return shown if len(texts) <= most else f"{shown} and {len(texts) - most} more"
