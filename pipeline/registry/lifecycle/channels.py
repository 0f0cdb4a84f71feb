"""The log of channel moves: append-only, signed, a chain; who is first wins.

    move = read_channel(store, policy, "phi3", variant, "stable", card)      # None: no such channel
    move = move_channel(store, reference, channel="candidate", card=card, key=key, ...)

`seq` counts from 1 without a gap, and each move names the SHA-256 of the one before; so a reader
sees when a move was taken out, put in, exchanged or brought from elsewhere. Creating the file of
the next `seq` exclusively is the compare-and-swap: whoever read an old log finds the name taken.

What stops a channel for good: a move in the log that nobody trusts any more, since its key was
revoked or somebody wrote rubbish. A person then looks at it and restarts the log: a move with
`restart` makes everything before it history that counts for nothing.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.core.errors import ConflictError, PipelineError, TransientError, UntrustedError
from pipeline.core.values import Reference
from pipeline.registry.lifecycle.records import Author, Move, now, read_move, sign_record
from pipeline.registry.reference import check_part
from pipeline.registry.signing.keys import SigningKey
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.stores.store import Store, WritableStore

log = logging.getLogger(__name__)

_FILE = re.compile(
    r"(?P<channel>[a-z][a-z0-9-]*)\.(?P<card>[A-Za-z0-9._-]+)\.(?P<seq>[0-9]{6,9})\.dsse\.json"
)
_TRIES = 5
"""How often a pointer is written again because the log went on meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """All moves of one channel of one card.

    Attributes:
        channel: Such as `stable`.
        card: As NVML calls it, spaces as dashes.
        moves: Verified, oldest first; from the last restart on. Empty if `fault` is not.
        fault: Why the log cannot be believed.
        last_seq: The highest number that is taken, verified or not.
        last_sha256: Of the bytes that lie under it; empty for none.
    """

    channel: str
    card: str
    moves: tuple[Move, ...] = ()
    fault: UntrustedError | None = None
    last_seq: int = 0
    last_sha256: str = ""

    @property
    def newest(self) -> Move | None:
        """Where the channel points; None if it was never moved.

        Raises:
            UntrustedError: The log cannot be believed.
        """
        if self.fault is not None:
            raise self.fault
        return self.moves[-1] if self.moves else None


def read_channel(
    store: Store, policy: TrustPolicy, name: str, variant: str, channel: str, card: str
) -> Move | None:
    """Where a channel points, by its verified log; None if it has none.

    Raises:
        UntrustedError: A move is missing, changed, out of its place, or nobody who may signed it.
    """
    return read_log(store, policy, name, variant, channel, card).newest


def read_channels(store: Store, policy: TrustPolicy, name: str, variant: str) -> list[Move]:
    """The newest move of every channel of a variant, for every card; sorted by both.

    Raises:
        UntrustedError: As in `read_channel`, for any of them.
    """
    newest = (log.newest for log in read_logs(store, policy, name, variant))
    return [move for move in newest if move is not None]


def read_log(
    store: Store, policy: TrustPolicy, name: str, variant: str, channel: str, card: str
) -> Log:
    """One log; one that cannot be believed carries its fault."""
    check_part("channel", channel)
    check_part("card", card)
    logs = read_logs(store, policy, name, variant, only=(channel, card))
    return logs[0] if logs else Log(channel=channel, card=card)


def read_logs(
    store: Store,
    policy: TrustPolicy,
    name: str,
    variant: str,
    only: tuple[str, str] | None = None,
) -> list[Log]:
    """The logs of a variant, sorted; those that cannot be believed carry their fault.

    Args:
        store: Where they lie.
        policy: Whose moves count.
        name: Recipe.
        variant: Of it.
        only: Channel and card; None for all.
    """
    held: dict[tuple[str, str], dict[int, bytes]] = {}
    for file, data in store.moves(name, variant).items():
        match = _FILE.fullmatch(file)
        if match is None or not (seq := int(match["seq"])) or match["seq"] != f"{seq:06d}":
            continue  # no move has such a name, so it hides none
        if only in {None, (match["channel"], match["card"])}:
            held.setdefault((match["channel"], match["card"]), {})[seq] = data
    where = f"{store.url} {name}/{variant}"
    return [
        _verified(files, policy, (name, variant, channel, card), where)
        for (channel, card), files in sorted(held.items())
    ]


def _verified(
    files: Mapping[int, bytes], policy: TrustPolicy, of: tuple[str, str, str, str], where: str
) -> Log:
    """Check one log, from its newest move back to its last restart."""
    channel, card = of[2:]
    last = max(files)
    last_sha256 = hashlib.sha256(files[last]).hexdigest()
    moves: list[Move] = []
    fault = None
    try:
        for seq in range(last, 0, -1):
            file = f"{channel}.{card}.{seq:06d}.dsse.json"
            move = _checked(files, seq, policy, of, f"{where} {file}")
            if moves and moves[-1].prev != move.sha256:
                raise UntrustedError(
                    f"{where} {moves[-1].file} follows another move than {file}: one of the two "
                    f"was exchanged; {_advice(channel, card)}"
                )
            moves.append(move)
            if move.restart:
                break
    except UntrustedError as error:
        moves, fault = [], error
    return Log(
        channel=channel,
        card=card,
        moves=tuple(reversed(moves)),
        fault=fault,
        last_seq=last,
        last_sha256=last_sha256,
    )


def _checked(
    files: Mapping[int, bytes],
    seq: int,
    policy: TrustPolicy,
    of: tuple[str, str, str, str],
    origin: str,
) -> Move:
    """A move that is signed, and lies where it says that it belongs."""
    if seq not in files:
        raise UntrustedError(f"{origin} is missing, and later moves are there; {_advice(*of[2:])}")
    move = read_move(files[seq], policy, origin)
    said = (move.reference.name, move.reference.variant, move.channel, move.card)
    if (*said, move.seq) != (*of, seq):
        raise UntrustedError(
            f"{origin} is move {move.seq} of {'/'.join(said[:2])}:{move.channel} for {move.card}; "
            f"somebody put it here; {_advice(*of[2:])}"
        )
    if (move.prev is None) != (seq == 1) and not move.restart:
        raise UntrustedError(f"{origin} does not say which move it follows; {_advice(*of[2:])}")
    return move


def _advice(channel: str, card: str) -> str:
    return (
        f"find out who may write there, then promote what {channel} of {card} is to be, "
        "with --restart-log"
    )


def move_channel(
    store: WritableStore,
    reference: Reference,
    *,
    channel: str,
    card: str,
    key: SigningKey,
    actor: str,
    policy: TrustPolicy,
    reason: str = "",
    seen: Move | None = None,
    restart: bool = False,
) -> Move:
    """Point a channel to a package; to where it points already is a success and no move.

    Checks nothing of the package: see `pipeline.registry.lifecycle.promote.enter_channel`.

    Args:
        store: Where both lie.
        reference: The package.
        channel: Such as `candidate`.
        card: The card that it counts for.
        key: Signs the move; the policy must let it sign channels.
        actor: Who moves it, for people.
        policy: By which the log is read; readers should have the same.
        reason: Why, for people.
        seen: The newest move when the caller decided; None if that played no part.
        restart: Give up the log as it is, should it not be believable.

    Returns:
        The newest move, which points to the package.

    Raises:
        ConflictError: Somebody else moved it elsewhere meanwhile; says who and where to.
        UntrustedError: The key may not, or the log cannot be believed.
        TransientError: Somebody else's move is not to be seen yet.
    """
    author = Author(key=key, actor=actor, reason=reason)
    policy.require_may(key.public, "channels")
    place = (reference.name, reference.variant, channel, card)
    held = read_log(store, policy, *place)
    newest = None if restart and held.fault else held.newest
    if newest is None or newest.reference != reference:
        if newest is not None and seen is not None and newest.sha256 != seen.sha256:
            raise _moved_away(newest, reference)
        data, move = _next_move(held, reference, author, restart=bool(restart and held.fault))
        try:
            store.put_move(reference.name, reference.variant, move.file, data)
        except ConflictError as error:
            newest = _won(store, policy, place, move, error)
        else:
            newest = _landed(store, policy, place, read_move(data, policy, move.file))
            log.info("%s of %s for %s is now %s", channel, reference.name, card, reference)
    _show(store, policy, place, newest)
    return newest


def _next_move(
    held: Log, reference: Reference, author: Author, *, restart: bool
) -> tuple[bytes, Move]:
    move = Move(
        channel=held.channel,
        card=held.card,
        reference=reference,
        seq=held.last_seq + 1,
        prev=held.last_sha256 or None,
        actor=author.actor,
        reason=author.reason,
        at=now(),
        restart=restart,
    )
    return sign_record(move, author.key), move


def _won(
    store: Store,
    policy: TrustPolicy,
    place: tuple[str, str, str, str],
    ours: Move,
    error: ConflictError,
) -> Move:
    """What came before our move, if that is as good as ours: the same target, or our own bytes."""
    newest = read_channel(store, policy, *place)
    if newest is None or newest.seq < ours.seq:
        raise TransientError(
            f"{ours.file} is taken, and its move is not to be seen yet; try again"
        ) from error
    if newest.reference == ours.reference:
        return newest
    raise _moved_away(newest, ours.reference) from error


def _landed(
    store: Store, policy: TrustPolicy, place: tuple[str, str, str, str], ours: Move
) -> Move:
    """Our move, as the log has it: a store without a real compare-and-swap may have lost it."""
    held = read_log(store, policy, *place)
    if held.newest is None or all(move.sha256 != ours.sha256 for move in held.moves):
        if held.newest is not None and held.newest.seq >= ours.seq:
            raise _moved_away(held.newest, ours.reference)
        raise TransientError(f"{ours.file} was written, and is not to be seen yet; try again")
    return ours


def _moved_away(newest: Move, reference: Reference) -> ConflictError:
    return ConflictError(
        f"{newest.actor} moved {newest.channel} of {newest.card} to {newest.reference} at "
        f"{newest.at}, while it was to be moved to {reference}; look at it, then try again"
    )


def _show(
    store: WritableStore, policy: TrustPolicy, place: tuple[str, str, str, str], move: Move
) -> None:
    """Bring the pointer up to the log.

    It is written last by whoever reads the log last: who finds a newer move after writing writes
    again. A pointer that stays behind misleads people only, so no error of it undoes the move.
    """
    name, variant, channel, card = place
    file = f"{channel}.{card}.json"
    try:
        for _ in range(_TRIES):
            if store.channels(name, variant).get(file) != move.pointer_bytes():
                store.put_channel(name, variant, file, move.pointer_bytes())
            newest = read_channel(store, policy, *place)
            if newest is None or newest.sha256 == move.sha256:
                return
            move = newest
    except PipelineError as error:
        log.warning(
            "%s of %s was moved, but %s could not be brought up to it: %s",
            *(channel, name, file, error),
        )


def stale_pointers(store: Store, moves: Sequence[Move]) -> list[str]:
    """Pointer files that are not what the newest moves say; they lose, and the next move repairs.

    Args:
        store: Where they lie.
        moves: The newest of every channel of one variant.
    """
    if not moves:
        return []
    reference = moves[0].reference
    shown = store.channels(reference.name, reference.variant)
    wanted = {f"{move.channel}.{move.card}.json": move.pointer_bytes() for move in moves}
    return sorted(file for file, data in wanted.items() if shown.get(file) != data)
