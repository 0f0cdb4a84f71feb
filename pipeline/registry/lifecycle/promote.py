"""Promote a package into a channel, and roll a channel back: both are moves to proven packages."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.core.errors import Fault, NotFoundError, RecipeError
from pipeline.core.values import Reference
from pipeline.registry.lifecycle.channels import (
    Log,
    move_channel,
    read_log,
    read_logs,
)
from pipeline.registry.lifecycle.evidence import require_admissible
from pipeline.registry.lifecycle.lookup import find, variants_of
from pipeline.registry.lifecycle.records import Author, Move
from pipeline.registry.reference import ParsedReference, check_part, parse_reference
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.signing.verification import SignedVerdict
from pipeline.registry.stores.store import Place, WritableStore


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a promotion or a rollback did.

    Attributes:
        move: The newest one, which points to the package.
        before: Where the channel pointed before; None for nowhere, or if that cannot be believed.
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
    restart: bool = False,
) -> Moved:
    """Move a channel to the package that a reference means.

    Args:
        store: Where both lie.
        text: The reference; `phi3:candidate` is one, too.
        channel: Where to.
        card: For which card; None for the only one that has a signed test result.
        author: Signs the move.
        policy: Whom to believe.
        restart: Give up a log that cannot be believed.

    Raises:
        PipelineError: As in `find`, `require_admissible` and `move_channel`.
    """
    check_part("channel", channel)
    return enter_channel(
        store,
        find(store, policy, text, card),
        channel=channel,
        card=card,
        author=author,
        policy=policy,
        restart=restart,
    )


def enter_channel(
    store: WritableStore,
    reference: Reference,
    *,
    channel: str,
    card: str | None,
    author: Author,
    policy: TrustPolicy,
    seen: Move | None = None,
    restart: bool = False,
) -> Moved:
    """Move a channel to a package, if the package may go there; `promote` by its exact reference.

    Raises:
        PipelineError: As in `require_admissible` and `move_channel`.
    """
    policy.require_may(author.key.public, "channels")  # before anything is read from far away
    verdict = require_admissible(store, reference, policy, channel=channel, card=card)
    held = read_log(store, policy, reference.name, reference.variant, channel, verdict.card)
    before = None if restart and held.fault else held.newest
    move = move_channel(
        store,
        reference,
        channel=channel,
        card=verdict.card,
        key=author.key,
        actor=author.actor,
        policy=policy,
        reason=author.reason,
        seen=seen,
        restart=restart,
    )
    try:
        store.read_manifest(Place.of(reference))
    except NotFoundError as error:  # by a collector that could not see the move yet
        raise NotFoundError(
            f"{reference} was removed while {channel} was moved to it; publish it again, or roll "
            "the channel back"
        ) from error
    return Moved(move=move, before=before.reference if before else None, verdict=verdict)


def rollback(
    store: WritableStore,
    text: str,
    *,
    channel: str,
    card: str | None,
    author: Author,
    policy: TrustPolicy,
    to: str | None = None,
) -> Moved:
    """Move a channel to where it pointed before: a new move, like any other.

    A second rollback brings back what the first one left; `to` goes further back.

    Args:
        store: Where the channel is.
        text: `NAME` or `NAME/VARIANT`.
        channel: Which one.
        card: Whose; None for the only one that has this channel.
        author: Signs the move.
        policy: Whom to believe.
        to: Reference of a package that was in this channel before; None for the previous one.

    Raises:
        NotFoundError: No such channel, or nothing was there before.
        RecipeError: Several are meant, or `to` was never in this channel.
        PipelineError: As in `enter_channel`: what was good enough once must still be.
    """
    name, variant, held = _the_log(store, policy, text, channel, card)
    newest = held.newest
    if newest is None:
        raise NotFoundError(f"{text} has no {channel} for {held.card}")
    earlier = [move.reference for move in held.moves if move.reference != newest.reference]
    if to is None:
        if not earlier:
            raise NotFoundError(
                f"{channel} of {name}/{variant} for {held.card} never pointed anywhere but to "
                f"{newest.reference}, so there is nothing to roll back to"
            )
        target = earlier[-1]
    else:
        target = find(store, policy, str(replace(parse_reference(to), variant=variant)))
        if target not in {move.reference for move in held.moves}:
            was = ", ".join(dict.fromkeys(map(str, earlier))) or "nothing else"
            raise RecipeError(
                [
                    Fault(
                        "--to",
                        f"{target} was never in {channel} of {held.card}, which had {was}; "
                        "promote it instead",
                    )
                ]
            )
    return enter_channel(
        store,
        target,
        channel=channel,
        card=held.card,
        author=author,
        policy=policy,
        seen=newest,
    )


def _the_log(
    store: WritableStore, policy: TrustPolicy, text: str, channel: str, card: str | None
) -> tuple[str, str, Log]:
    """The one log that is meant, with name and variant."""
    if ":" in text or "@" in text:
        raise RecipeError(
            [Fault("", f"{text} names a package; write NAME or NAME/VARIANT, and --to {text}")]
        )
    wanted: ParsedReference = parse_reference(text)
    check_part("channel", channel)
    found = [
        (wanted.name, variant, held)
        for variant in variants_of(store, wanted)
        if wanted.variant in {None, variant}
        for held in read_logs(store, policy, wanted.name, variant)
        if held.channel == channel and card in {None, held.card}
    ]
    if len(found) > 1:
        which = ", ".join(f"{name}/{variant} --card {held.card}" for name, variant, held in found)
        raise RecipeError([Fault("", f"{channel} of {text} may be that of {which}; name one")])
    if not found:
        for_card = f" for {card}" if card else ""
        raise NotFoundError(
            f"{text} has no {channel}{for_card} that was ever moved by a signed move; "
            "`enginesmith channels` shows those that there are"
        )
    return found[0]
