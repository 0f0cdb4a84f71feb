"""Channels: where they point, by chains of signed moves.

    channels = read_channels(store, policy, "phi3", variant)
    move_channel(store, reference, channel="candidate", card=card, author=author, policy=policy)

A move names its registry, channel, card and the move before it (`predecessor`, the SHA-256 of that
one's payload; none for the first). That and the signed times order them; names and dates in a store
do not. What is not a trusted move of this registry, channel and card is skipped, so rubbish in a
log stops no channel, and neither does a revoked key: what it signed falls out, and the moves after
it stay.

Of two moves with the same predecessor the one that was signed earlier counts, and its rival and
all that follow the rival do not; the rival's author gets a `ConflictError`. No store is asked for a
lock: an author looks at the log again after as much time as its own move took to be written. Two
clocks that differ may still let an author believe that a move counts which an earlier one, slow to
arrive, replaces; the log then says so to everyone alike.

A reader holds no memory of a log, so it cannot see that the newest moves were taken away;
deployments that must know pin digests (docs/reliability.md).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.core.errors import ConflictError, PipelineError, TransientError, UntrustedError
from pipeline.core.values import Reference
from pipeline.registry.reference import check_part
from pipeline.registry.store import ENVELOPE, Store, WritableStore
from pipeline.registry.trust.policy import TrustedKey, TrustPolicy
from pipeline.registry.trust.statements import (
    Author,
    open_statement,
    place_fields,
    sign_statement,
    warn_skipped,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Move:
    """A move of a channel that a trusted key signed.

    Attributes:
        channel: Such as `stable`.
        card: As NVML calls it, spaces as dashes.
        reference: Where the channel points from then on.
        predecessor: Id of the move before; None for the first.
        actor: Who moved it, for people.
        reason: Why; may be empty.
        signed_at: As in `Statement`.
        signer: Of the policy.
        id: As in `Statement`.
    """

    channel: str
    card: str
    reference: Reference
    predecessor: str | None
    actor: str
    reason: str
    signed_at: str
    signer: TrustedKey
    id: str


@dataclass(frozen=True, kw_only=True)
class Channel:
    """A channel of one card.

    Attributes:
        name: Such as `stable`.
        card: Whose.
        moves: Those that count, oldest first; at least one.
    """

    name: str
    card: str
    moves: tuple[Move, ...]

    @property
    def newest(self) -> Move:
        """The move that says where it points."""
        return self.moves[-1]


def read_channels(
    store: Store, policy: TrustPolicy, name: str, variant: str, channel: str | None = None
) -> list[Channel]:
    """The channels of a variant, by name and card.

    Of all names where `channel` is None.
    """
    log_of_moves = store.read_moves(name, variant)
    identity = store.identity() if log_of_moves else None
    moves: dict[tuple[str, str], dict[str, Move]] = {}
    skipped: list[str] = []
    for data in log_of_moves:
        try:
            move = _read_move(data, policy, (name, variant), identity)
        except UntrustedError as error:
            skipped.append(str(error))
        else:
            if channel in {None, move.channel}:
                moves.setdefault((move.channel, move.card), {})[move.id] = move
    if skipped:
        origin = f"{store.url} {name}/{variant}"
        warn_skipped(origin, "a move of a channel", tuple(skipped))
    return [
        Channel(name=key[0], card=key[1], moves=_chain(found.values()))
        for key, found in sorted(moves.items())
    ]


def read_channel(
    store: Store, policy: TrustPolicy, name: str, variant: str, channel: str, card: str
) -> Channel | None:
    """One channel of one card; None if no move of it counts."""
    check_part("channel", channel)
    check_part("card", card)
    found = read_channels(store, policy, name, variant, channel)
    return next((one for one in found if one.card == card), None)


def _read_move(data: bytes, policy: TrustPolicy, of: tuple[str, str], identity: str | None) -> Move:
    found = open_statement(data, policy)
    if found.kind != "move":
        raise UntrustedError(f"it is a {found.kind}")
    if found.fields.get("registry") != identity:
        raise UntrustedError("it is a move of another registry")
    reference = found.reference()
    if (reference.name, reference.variant) != of:
        raise UntrustedError(f"it is a move of {reference.name}/{reference.variant}")
    return Move(
        channel=found.part("channel"),
        card=found.part("card"),
        reference=reference,
        predecessor=found.text("predecessor") if found.fields.get("predecessor") else None,
        actor=found.text("actor"),
        reason=found.text("reason"),
        signed_at=found.signed_at,
        signer=found.signer,
        id=found.id,
    )


def _chain(moves: Iterable[Move]) -> tuple[Move, ...]:
    """The moves that count, oldest first; pure.

    A move whose predecessor is not among them (its key was revoked, or it was deleted) begins a
    piece of the chain; pieces follow each other by the signed time of their first move.
    """
    first_of: dict[str | None, Move] = {}
    known = {move.id for move in moves}
    for move in sorted(moves, key=lambda one: (one.signed_at, one.id)):
        first_of.setdefault(move.predecessor, move)
    starts = [move for before, move in first_of.items() if before not in known]
    chain: list[Move] = []
    for start in sorted(starts, key=lambda one: (one.signed_at, one.id)):
        following: Move | None = start
        while following is not None:  # ends: an id is a digest over the one before
            chain.append(following)
            following = first_of.get(following.id)
    return tuple(chain)


def move_channel(
    store: WritableStore,
    reference: Reference,
    *,
    channel: str,
    card: str,
    author: Author,
    policy: TrustPolicy,
    seen: Move | None = None,
) -> Move:
    """Point a channel to a package; where it points there already, nothing is written.

    Checks nothing of the package: see `pipeline.registry.promotion`.

    The policy is the one by which the log is read; readers should have the same. `seen` is the
    newest move when the caller decided; None if that played no part.

    Returns:
        The newest move, which points to the package.

    Raises:
        ConflictError: Another author moved it elsewhere meanwhile; names who and where to.
        UntrustedError: The key may not.
        TransientError: The move was written and does not show.
    """
    policy.require_may(author.key.public, "channels")
    of = (reference.name, reference.variant, channel, card)
    held = read_channel(store, policy, *of)
    newest = held.newest if held else None
    if newest is not None and newest.reference == reference:
        return newest
    if newest is not None and seen is not None and newest.id != seen.id:
        raise _moved_away(newest, reference)
    started_s = time.monotonic()
    fields = {
        "registry": store.identity() or store.create_identity(),
        **place_fields(reference),
        "channel": channel,
        "card": card,
        "predecessor": newest.id if newest else None,
        "actor": author.actor,
        "reason": author.reason,
    }
    after = newest.signed_at if newest else ""
    raw = sign_statement("move", reference.digest, fields, author.key, after=after)
    ours = open_statement(raw.files[ENVELOPE], policy).id
    store.put_move(reference.name, reference.variant, raw.files[ENVELOPE])
    time.sleep(time.monotonic() - started_s)  # what a rival signed before us shows by then
    done = _landed(read_channel(store, policy, *of), ours, reference, channel)
    log.info("%s of %s for %s is now %s", channel, reference.name, card, reference)
    _write_hint(store, done)
    return done


def _landed(held: Channel | None, ours: str, reference: Reference, channel: str) -> Move:
    """Our move, if the log has it; another one that points where ours does is as good."""
    moves: Sequence[Move] = held.moves if held else ()
    for move in moves:
        if move.id == ours:
            return move
    if not moves:
        raise TransientError(f"the move of {channel} was written and does not show yet; try again")
    if moves[-1].reference == reference:
        return moves[-1]
    raise _moved_away(moves[-1], reference)


def _moved_away(newest: Move, reference: Reference) -> ConflictError:
    return ConflictError(
        f"{newest.actor} moved {newest.channel} of {newest.card} to {newest.reference} at "
        f"{newest.signed_at}, while it was to be moved to {reference}; look at it, then try again"
    )


def _write_hint(store: WritableStore, move: Move) -> None:
    """Show people where the channel points; a hint that stays behind undoes no move."""
    reference = move.reference
    value = {
        **place_fields(reference),
        "channel": move.channel,
        "card": move.card,
        "digest": reference.digest,
        "actor": move.actor,
        "reason": move.reason,
        "signed_at": move.signed_at,
        "move": move.id,
    }
    data = (json.dumps(value, indent=1) + "\n").encode()
    try:
        store.put_hint(reference.name, reference.variant, move.channel, move.card, data)
    except PipelineError as error:
        log.warning("%s of %s was moved; its hint was not: %s", move.channel, move.card, error)
