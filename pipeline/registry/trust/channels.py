"""Channels: where they point, by chains of signed moves.

    channels = read_channels(store, policy, "phi3", variant)

A move names its registry, channel, card and the move before it (`predecessor`, the SHA-256 of that
one's payload; none for the first). That and the signed times order them; names and dates in a store
do not. What is not a trusted move of this registry, channel and card is skipped, so rubbish in a
log stops no channel, and neither does a revoked key: what it signed falls out, and the moves after
it stay.

Of two moves with the same predecessor the one that was signed earlier counts, and its rival and
all that follow the rival do not. A reader holds no memory of a log, so it cannot see that the
newest moves were taken away; deployments that must know pin digests (docs/reliability.md).
promotion.py makes moves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.core.errors import UntrustedError
from pipeline.core.values import Reference
from pipeline.registry.store import Reader
from pipeline.registry.trust.policy import TrustedKey, TrustPolicy
from pipeline.registry.trust.statements import open_statement, warn_skipped


@dataclass(frozen=True, kw_only=True)
class Move:
    """A move that a trusted key signed: where the channel of a card points from then on.

    `predecessor` is the id of the move before, None for the first; `actor` and `reason` are for
    people.
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
    """A channel of one card: the moves that count, oldest first; at least one."""

    name: str
    card: str
    moves: tuple[Move, ...]

    @property
    def newest(self) -> Move:
        """Says where it points."""
        return self.moves[-1]


def read_channels(
    store: Reader, policy: TrustPolicy, name: str, variant: str, channel: str | None = None
) -> list[Channel]:
    """The channels of a variant, by name and card; of all names where `channel` is None."""
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
        warn_skipped(f"{store.url} {name}/{variant}", "a move of a channel", tuple(skipped))
    return [
        Channel(name=key[0], card=key[1], moves=_chain(found.values()))
        for key, found in sorted(moves.items())
    ]


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
    """The moves that count, oldest first.

    A move whose predecessor is not among them (its key was revoked, or it was deleted) begins a
    piece of the chain; pieces follow each other by the signed time of their first move.
    """
    first_of: dict[str | None, Move] = {}
    known = {move.id for move in moves}
    for move in sorted(moves, key=lambda one: (one.signed_at, one.id)):
        first_of.setdefault(move.predecessor, move)
    chain: list[Move] = []
    for start in [move for before, move in first_of.items() if before not in known]:
        following: Move | None = start
        while following is not None:  # ends: an id is a digest over the one before
            chain.append(following)
            following = first_of.get(following.id)
    return tuple(chain)
