"""Move channels and yank packages in one author's name; sign or copy a package for others.

    releaser = Releaser(store=store, author=author, policy=policy)
    releaser.promote("phi3:candidate", "stable", card)

`stable` takes packages that are proven on the card, every other channel also those whose newest
verdict for the card is `checked` or `compiled`. A yanked version stays where it is; readers refuse
it (exit 5). Undoing a yank is a later yank with `yanked: false`.

Of two moves after the same one the earlier signed counts, and the other's author gets a
`ConflictError`. No store is asked for a lock: an author looks at the log again after as much time
as its own move took to be written. Two clocks that differ may still let an author believe that a
move counts which an earlier one, slow to arrive, replaces; the log then says so to everyone alike.

A copy has the same bytes and the same signatures, provenance and test results, which name the
package's digest; channels and yanks stay behind: who runs a registry decides what its `stable` is.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.core.errors import (
    ConflictError,
    Fault,
    NotAcceptedError,
    NotFoundError,
    PipelineError,
    RecipeError,
    TransientError,
    UntrustedError,
)
from pipeline.core.progress import BYTES, progress
from pipeline.core.published import PASSING, Reference
from pipeline.registry.client.verify import fetch
from pipeline.registry.package import require_manifest_publishable
from pipeline.registry.reference import check_part, parse_reference
from pipeline.registry.resolve import examine, resolve
from pipeline.registry.store import ENVELOPE, Place, RawStatement, Store
from pipeline.registry.stores import open_reader, open_store
from pipeline.registry.stores.publication import WritableStore
from pipeline.registry.trust.machine import machine_trust
from pipeline.registry.trust.policy import TrustPolicy
from pipeline.registry.trust.private_key import SigningKey
from pipeline.registry.trust.signing import place_fields, sign_again, sign_package, sign_statement
from pipeline.registry.trust.statements import open_statement, text_fault, whole_statements
from pipeline.registry.trust.verification import (
    Channel,
    Move,
    Resolved,
    SignedVerdict,
    Terms,
    read_channels,
)

log = logging.getLogger(__name__)

_STABLE = "stable"
_MOST_WAIT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Moved:
    """The newest move, where the channel pointed before it, and the verdict that let it in."""

    move: Move
    before: Reference | None
    verdict: SignedVerdict

    @property
    def changed(self) -> bool:
        return self.before != self.move.reference


@dataclass(frozen=True, kw_only=True)
class Releaser:
    """Moves channels and yanks packages, if the policy lets this key (else UntrustedError).

    `actor` and `reason` are for people: one printable line each (else RecipeError).
    """

    store: WritableStore
    policy: TrustPolicy
    key: SigningKey
    actor: str
    reason: str = ""

    def __post_init__(self) -> None:
        for kind, text in (("actor", self.actor), ("reason", self.reason)):
            if fault := text_fault(text):
                raise RecipeError([Fault(kind, fault)])
        self.policy.require_may(self.key.public, "channels")

    def promote(self, text: str, channel: str, card: str | None = None) -> Moved:
        check_part("channel", channel)
        return self.enter(resolve(self.store, text, Terms(policy=self.policy), card), channel, card)

    def enter(
        self, found: Resolved, channel: str, card: str | None, *, seen: Move | None = None
    ) -> Moved:
        """Move a channel to a package, if the package may go there.

        Without a card: for the only one that has a test result, else a RecipeError that lists
        them. UntrustedError without a trusted result for the card, NotAcceptedError if it does not
        suffice; raises like `move`, too.
        """
        reference = found.reference
        verdict = _require_enterable(found, channel, card)
        moves = self._moves(reference, channel, verdict.card)
        move = self.move(reference, channel, verdict.card, seen=seen)
        try:
            self.store.read_manifest(Place.of(reference))
        except NotFoundError as error:  # by a collector that could not see the move yet
            raise NotFoundError(
                f"{reference} was removed while {channel} was moved to it; publish it again, or "
                "roll the channel back"
            ) from error
        before = moves[-1].reference if moves else None
        return Moved(move=move, before=before, verdict=verdict)

    def rollback(self, text: str, channel: str, card: str | None = None) -> Moved:
        """Move a channel to where it pointed before: a new move, like any other.

        A second rollback brings back what the first one left; `promote` goes further back. `text`
        is `NAME` or `NAME/VARIANT`; without a card: of the only one that has this channel.

        What was good enough once must still be, so it raises like `enter`; NotFoundError if there
        is no such channel, or nothing was there before, RecipeError if several are meant.
        """
        check_part("channel", channel)
        found = {
            f"{name}/{variant} --card {held.card}": held
            for name, variant, held in channels_of(self.store, self.policy, text, channel)
            if card in {None, held.card}
        }
        if len(found) > 1:
            fault = f"{channel} of {text} is ambiguous: {', '.join(found)}; specify one"
            raise RecipeError([Fault("", fault)])
        if not found:
            raise NotFoundError(
                f"{text} has no {channel}{f' for {card}' if card else ''} that a trusted move "
                "made; `enginesmith channels` shows those that there are"
            )
        (held,) = found.values()
        newest = held.newest
        earlier = [move.reference for move in held.moves if move.reference != newest.reference]
        if not earlier:
            raise NotFoundError(
                f"{channel} of {text} for {held.card} never pointed anywhere but to "
                f"{newest.reference}, so there is nothing to roll back to"
            )
        terms = Terms(policy=self.policy)
        old = examine(self.store, Place.of(earlier[-1]), terms, earlier[-1].digest)
        return self.enter(old, channel, held.card, seen=newest)

    def move(
        self, reference: Reference, channel: str, card: str, *, seen: Move | None = None
    ) -> Move:
        """Point a channel to a package, whatever it is; the newest move, which does.

        `seen` is the newest move when the caller decided; None if that played no part.
        ConflictError if another author moved it elsewhere meanwhile, names who and where to;
        TransientError if the move was written and does not show.
        """
        check_part("channel", channel)
        check_part("card", card)
        moves = self._moves(reference, channel, card)
        newest = moves[-1] if moves else None
        if newest is not None and newest.reference == reference:
            return newest
        if newest is not None and seen is not None and newest.id != seen.id:
            raise _moved_away(newest, reference)
        started_s = time.monotonic()
        more = {"channel": channel, "card": card, "predecessor": newest.id if newest else None}
        fields, key = self._fields(reference, more), self.key
        after = newest.signed_at if newest else ""
        envelope = sign_statement("move", reference.digest, fields, key, after=after).envelope
        self.store.put_move(reference.name, reference.variant, envelope)
        # What a rival signed before us shows by then.
        time.sleep(min(time.monotonic() - started_s, _MOST_WAIT_S))
        moves, ours = self._moves(reference, channel, card), open_statement(envelope, self.policy)
        if not moves:
            fault = f"the move of {channel} was written and does not show yet; try again"
            raise TransientError(fault)
        # Another move that points where ours does is as good.
        done = next((one for one in moves if one.id == ours.id), moves[-1])
        if done.reference != reference:
            raise _moved_away(done, reference)
        log.info("%s of %s for %s is now %s", channel, reference.name, card, reference)
        self._write_hint(done)
        return done

    def _moves(self, reference: Reference, channel: str, card: str) -> tuple[Move, ...]:
        of = (reference.name, reference.variant, channel)
        found = read_channels(self.store, self.policy, *of)
        return next((one.moves for one in found if one.card == card), ())

    def _fields(self, reference: Reference, more: Mapping[str, object]) -> dict[str, object]:
        return {
            "registry": self.store.identity() or self.store.create_identity(),
            **place_fields(reference),
            **more,
            "actor": self.actor,
            "reason": self.reason,
        }

    def _write_hint(self, move: Move) -> None:
        """Show people where the channel points; a hint that stays behind undoes no move."""
        reference, channel, card = move.reference, move.channel, move.card
        value = {**place_fields(reference), **move.to_json(), "move": move.id}
        data = (json.dumps(value, indent=1) + "\n").encode()
        try:
            self.store.put_hint(reference.name, reference.variant, channel, card, data)
        except PipelineError as error:
            log.warning("%s of %s was moved; its hint was not: %s", channel, card, error)

    def yank(self, text: str, *, undo: bool = False) -> tuple[Resolved, bool]:
        """Yank a package, or undo that; gives the package as it is now, and whether that is new.

        RecipeError without a reason, or to undo where nothing is yanked; ConflictError if the yank
        was written and does not count.
        """
        if not undo and not self.reason:
            raise RecipeError([Fault("--reason", "give one, for those whose pull it stops")])
        # What is to be yanked need not be signed, nor by a key that is still trusted.
        lenient = replace(self.policy, revoked_digests=(), builder_ids=())
        terms = Terms(policy=lenient, allow_unsigned=True, allow_yanked=True)
        found = resolve(self.store, text, terms)
        latest = next(iter(found.yanks), None)
        if latest is None and undo:
            raise RecipeError([Fault("--undo", f"{found.place} is not yanked")])
        if latest is not None and latest.fields["yanked"] is not undo:
            return found, False
        fields = self._fields(found.reference, {"yanked": not undo})
        after = latest.signed_at if latest else ""
        raw = sign_statement("yank", found.package.digest, fields, self.key, after=after)
        self.store.put_statement(found.place, raw)
        done = examine(self.store, found.place, terms, found.package.digest)
        if (done.yank is None) is not undo:
            raise ConflictError(
                f"others yank {found.place} at the same time; look at it, then try again"
            )
        return done, True


def channels_of(
    store: Store, policy: TrustPolicy, text: str | None = None, channel: str | None = None
) -> list[tuple[str, str, Channel]]:
    """Channels with their name and variant: of `NAME` or `NAME/VARIANT`, else of all.

    RecipeError if `text` names a package, NotFoundError if there is nothing of this name.
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


def _require_enterable(found: Resolved, channel: str, card: str | None) -> SignedVerdict:
    """The test result that lets a package into a channel of a card; raises like `enter`."""
    manifest = found.package.manifest
    what = f"{manifest['name']}/{manifest['variant']}@sha256:{found.package.digest[:12]}"
    cards = sorted({verdict.card for verdict in found.verdicts})
    if card is None and len(cards) > 1:
        fault = f"{what} has results for {', '.join(cards)}; specify one"
        raise RecipeError([Fault("--card", fault)])
    card = card or (cards[0] if cards else None)
    verdict = found.standing(card) if card else None
    if verdict is None:
        raise UntrustedError(
            f"{what} may not enter {channel} of {card or 'any card'}: it has no trusted test "
            "result for it; run enginesmith accept on the card"
        )
    if channel == _STABLE and found.proof(verdict.card) is not None:
        return verdict
    if channel != _STABLE and verdict.verdict in PASSING:
        return verdict
    wanted = "accepted" if channel == _STABLE else " or ".join(sorted(PASSING))
    raise NotAcceptedError(
        f"{what} may not enter {channel} of {verdict.card}: its newest trusted verdict is "
        f"{verdict.verdict}, by {' '.join(verdict.runtime)}, and it needs {wanted}"
    )


def _moved_away(newest: Move, reference: Reference) -> ConflictError:
    return ConflictError(
        f"{newest.actor} moved {newest.channel} of {newest.card} to {newest.reference} at "
        f"{newest.signed_at}, while it was to be moved to {reference}; look at it, then try again"
    )


def countersign(store: WritableStore, text: str, key: SigningKey, policy: TrustPolicy) -> Resolved:
    """Sign a package with another key, and its provenance and test results, as far as trusted here.

    So what one machine built and tested for itself counts for others, who trust this key. Gives the
    package as it was before; raises like `resolve`.
    """
    found = resolve(store, text, Terms(policy=policy))
    store.put_statement(found.place, sign_package(found.package, key))
    # Oldest first, as they were signed.
    ours = [one for one in reversed(found.statements) if one.kind in {"provenance", "test"}]
    for one, files in whole_statements(ours, store, found.place):
        store.put_statement(found.place, sign_again(one, key, files))
    return found


@dataclass(frozen=True, kw_only=True)
class Copied:
    """What was copied: as the target has it now, whether it is new there, statements added."""

    resolved: Resolved
    new: bool
    added: int


def copy(
    reference: str,
    source_url: str,
    target_url: str,
    environ: Mapping[str, str],
    *,
    policy: Path | None = None,
    allow_unsigned: bool = False,
) -> Copied:
    """Copy one package with everything that trusted keys stated about it.

    UntrustedError if its signer is not trusted in both places, RecipeError if its licence forbids
    it to be there, or it is a rehearsal.
    """
    if source_url == target_url:
        raise RecipeError([Fault("--to", "is the same registry as --from; name another one")])
    source, target = open_reader(source_url), open_store(target_url)
    # This machine's own key counts for its own folders only: elsewhere it is a stranger's.
    trust = machine_trust(environ, own_folder=source.local and target.local, policy=policy)
    terms = Terms(policy=trust, allow_unsigned=allow_unsigned)
    target.check_writable()
    resolved = resolve(source, reference, terms)
    require_manifest_publishable(resolved.package.manifest, public=target.public)
    package = fetch(source, resolved)
    stated = [one for one in reversed(resolved.statements) if one.kind != "yank"]
    statements = [
        RawStatement(name=one.name, files={ENVELOPE: one.envelope, **files})
        for one, files in whole_statements(stated, source, resolved.place)
    ]
    with progress(f"Copying {resolved.place}", package.size_bytes, BYTES) as on_bytes:
        new = target.put_package(package, statements, on_bytes)
    # What a package that was there already does not have.
    added = [one for one in statements if new or target.put_statement(resolved.place, one)]
    there = examine(target, resolved.place, terms, package.digest)
    return Copied(resolved=there, new=new, added=len(added))
