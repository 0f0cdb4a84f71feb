"""Promote a package into a channel, roll a channel back, yank a package, sign it with another key.

`stable` takes packages that are proven on the card, every other channel also those whose newest
verdict for the card is `checked` or `compiled`. A yanked version stays where it is; readers refuse
it (exit 5). Undoing a yank is a later yank with `yanked: false`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.core.errors import (
    ConflictError,
    Fault,
    NotAcceptedError,
    NotFoundError,
    RecipeError,
    UntrustedError,
)
from pipeline.core.values import PASSING, Reference
from pipeline.registry.reference import check_part, parse_reference
from pipeline.registry.resolve import Resolved, Terms, examine, resolve
from pipeline.registry.store import Place, Store, WritableStore
from pipeline.registry.trust.channels import (
    Channel,
    Move,
    move_channel,
    read_channel,
    read_channels,
)
from pipeline.registry.trust.keys import SigningKey
from pipeline.registry.trust.policy import TrustPolicy
from pipeline.registry.trust.signatory import sign_package
from pipeline.registry.trust.statements import (
    Author,
    place_fields,
    sign_again,
    sign_statement,
    verified_files,
)
from pipeline.registry.trust.verification import SignedVerdict, Verification, Yank

_STABLE = "stable"


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a promotion or a rollback did.

    Attributes:
        move: The newest one, which points to the package.
        before: Where the channel pointed before; None for nowhere.
        verdict: What let the package in.
    """

    move: Move
    before: Reference | None
    verdict: SignedVerdict

    @property
    def changed(self) -> bool:
        """False if the channel pointed there already."""
        return self.before != self.move.reference


def promote(
    store: WritableStore,
    text: str,
    *,
    channel: str,
    card: str | None,
    author: Author,
    policy: TrustPolicy,
) -> Moved:
    """Move a channel to the package that a reference means.

    Without a card: for the only one that has a test result.

    Raises:
        PipelineError: As in `resolve` and `enter_channel`.
    """
    check_part("channel", channel)
    policy.require_may(author.key.public, "channels")  # before anything is read from far away
    found = resolve(store, text, Terms(policy=policy), card)
    return enter_channel(store, found, channel=channel, card=card, author=author, policy=policy)


def enter_channel(
    store: WritableStore,
    found: Resolved,
    *,
    channel: str,
    card: str | None,
    author: Author,
    policy: TrustPolicy,
    seen: Move | None = None,
) -> Moved:
    """Move a channel to a package, if the package may go there.

    Without a card: for the only one that has a test result. `seen` is that of `move_channel`.

    Raises:
        RecipeError: No card was named, and several have results; lists them.
        UntrustedError: It is unsigned, or has no trusted result for the card.
        NotAcceptedError: Its result does not suffice.
        ConflictError: As in `move_channel`.
    """
    reference = found.reference
    verdict = require_enterable(found.verification, channel, card)
    of = (reference.name, reference.variant, channel, verdict.card)
    held = read_channel(store, policy, *of)
    before = held.newest.reference if held else None
    move = move_channel(
        store,
        reference,
        channel=channel,
        card=verdict.card,
        author=author,
        policy=policy,
        seen=seen,
    )
    try:
        store.read_manifest(Place.of(reference))
    except NotFoundError as error:  # by a collector that could not see the move yet
        raise NotFoundError(
            f"{reference} was removed while {channel} was moved to it; publish it again, or roll "
            "the channel back"
        ) from error
    return Moved(move=move, before=before, verdict=verdict)


def require_enterable(found: Verification, channel: str, card: str | None) -> SignedVerdict:
    """The test result that lets a package into a channel of a card; pure.

    Raises:
        UntrustedError: The package is unsigned, or has no trusted result for the card.
        NotAcceptedError: The result does not suffice.
        RecipeError: No card was named, and several have results; lists them.
    """
    manifest = found.package.manifest
    what = f"{manifest['name']}/{manifest['variant']}@sha256:{found.package.digest[:12]}"
    if found.signer is None:
        raise UntrustedError(
            f"{what} may not enter {channel}: no trusted key signed it; sign it with "
            "enginesmith sign"
        )
    card = card or _only_card(found, what)
    verdict = found.standing(card)
    if verdict is None:
        raise UntrustedError(
            f"{what} may not enter {channel} of {card}: it has no trusted test result for this "
            "card; run enginesmith accept there"
        )
    proven = found.proof(card) is not None
    if not (proven if channel == _STABLE else verdict.verdict in PASSING):
        wanted = "accepted" if channel == _STABLE else " or ".join(sorted(PASSING))
        raise NotAcceptedError(
            f"{what} may not enter {channel} of {card}: its newest trusted verdict is "
            f"{verdict.verdict}, by {' '.join(verdict.runtime)}, and it needs {wanted}"
        )
    return verdict


def _only_card(found: Verification, what: str) -> str:
    cards = sorted({verdict.card for verdict in found.verdicts})
    if not cards:
        raise UntrustedError(
            f"{what} has no trusted test result; run enginesmith accept on the card that it is for"
        )
    if len(cards) > 1:
        raise RecipeError(
            [Fault("--card", f"{what} has results for {', '.join(cards)}; specify one")]
        )
    return cards[0]


def rollback(
    store: WritableStore,
    text: str,
    *,
    channel: str,
    card: str | None,
    author: Author,
    policy: TrustPolicy,
) -> Moved:
    """Move a channel to where it pointed before: a new move, like any other.

    A second rollback brings back what the first one left; `promote` goes further back.

    `text` is `NAME` or `NAME/VARIANT`; without a card: of the only one that has this channel.

    Raises:
        NotFoundError: No such channel, or nothing was there before.
        RecipeError: Several are meant.
        PipelineError: As in `enter_channel`: what was good enough once must still be.
    """
    policy.require_may(author.key.public, "channels")
    held = _find_channel(store, text, channel, card, policy)
    newest = held.newest
    earlier = [move.reference for move in held.moves if move.reference != newest.reference]
    if not earlier:
        raise NotFoundError(
            f"{channel} of {text} for {held.card} never pointed anywhere but to "
            f"{newest.reference}, so there is nothing to roll back to"
        )
    found = examine(store, Place.of(earlier[-1]), Terms(policy=policy), earlier[-1].digest)
    return enter_channel(
        store,
        found,
        channel=channel,
        card=held.card,
        author=author,
        policy=policy,
        seen=newest,
    )


def channels_of(
    store: Store, policy: TrustPolicy, text: str | None = None, channel: str | None = None
) -> list[tuple[str, str, Channel]]:
    """Channels with their name and variant.

    `text` is `NAME` or `NAME/VARIANT`; None for all, as for `channel`.

    Raises:
        RecipeError: `text` names a package.
        NotFoundError: There is nothing of this name or variant.
    """
    if text is not None and (":" in text or "@" in text):
        raise RecipeError([Fault("", f"{text} names a package; write NAME or NAME/VARIANT")])
    wanted = parse_reference(text) if text is not None else None
    places = store.places(wanted.name, wanted.variant) if wanted else store.places()
    if wanted and not places:
        raise NotFoundError(f"{store.url} has no {text}; `enginesmith list` shows what it has")
    return [
        (name, variant, found)
        for name, variant in dict.fromkeys((place.name, place.variant) for place in places)
        for found in read_channels(store, policy, name, variant, channel)
    ]


def _find_channel(
    store: Store, text: str, channel: str, card: str | None, policy: TrustPolicy
) -> Channel:
    """The one channel that is meant."""
    check_part("channel", channel)
    found = {
        f"{name}/{variant} --card {held.card}": held
        for name, variant, held in channels_of(store, policy, text, channel)
        if card in {None, held.card}
    }
    if len(found) > 1:
        raise RecipeError(
            [Fault("", f"{channel} of {text} is ambiguous: {', '.join(found)}; specify one")]
        )
    if not found:
        raise NotFoundError(
            f"{text} has no {channel}{f' for {card}' if card else ''} that a trusted move made; "
            "`enginesmith channels` shows those that there are"
        )
    return next(iter(found.values()))


def yank_package(
    store: WritableStore,
    text: str,
    author: Author,
    policy: TrustPolicy,
    *,
    undo: bool = False,
) -> tuple[Resolved, bool]:
    """Yank a package, or undo that; what is so already is a success.

    Returns:
        The package as it is now, and whether anything changed.

    Raises:
        UntrustedError: The key may not.
        NotFoundError: No such package.
        RecipeError: No reason, or an undo where nothing is yanked.
        ConflictError: The yank was written and does not count.
    """
    policy.require_may(author.key.public, "channels")
    if not undo and not author.reason:
        raise RecipeError([Fault("--reason", "give one, for those whose pull it stops")])
    # What is to be yanked need not be signed, nor by a key that is still trusted.
    lenient = replace(policy, revoked_digests=(), builder_ids=())
    terms = Terms(policy=lenient, allow_unsigned=True, allow_yanked=True)
    found = resolve(store, text, terms)
    latest = _latest(found)
    if latest is None and undo:
        raise RecipeError([Fault("--undo", f"{found.place} is not yanked")])
    if latest is not None and latest.yanked is not undo:
        return found, False
    fields = {
        "registry": store.identity() or store.create_identity(),
        **place_fields(found.reference),
        "yanked": not undo,
        "actor": author.actor,
        "reason": author.reason,
    }
    after = latest.signed_at if latest else ""
    raw = sign_statement("yank", found.package.digest, fields, author.key, after=after)
    store.put_statement(found.place, raw)
    done = examine(store, found.place, terms, found.package.digest)
    if (now := _latest(done)) is None or now.yanked is undo:
        raise ConflictError(
            f"others yank {found.place} at the same time; look at it, then try again"
        )
    return done, True


def _latest(found: Resolved) -> Yank | None:
    yanks = found.verification.yanks
    return yanks[0] if yanks else None


def countersign(store: WritableStore, text: str, key: SigningKey, policy: TrustPolicy) -> Resolved:
    """Sign a package with another key, and its provenance and test results, as far as trusted here.

    So what one machine built and tested for itself counts for others, who trust this key.

    Returns:
        The package, as it was before.

    Raises:
        PipelineError: As in `resolve`.
        CorruptError: A report is not what was signed.
    """
    found = resolve(store, text, Terms(policy=policy))
    signed = [sign_package(found.package, key)]
    for one in reversed(found.verification.statements):  # oldest first, as they were signed
        if one.kind in {"provenance", "test"}:
            raw = store.read_statement(found.place, one.name)
            signed.append(sign_again(one, key, verified_files(one, raw)))
    for statement in signed:
        store.put_statement(found.place, statement)
    return found
