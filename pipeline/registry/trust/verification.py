"""What counts of all that was stated: about packages, and where their channels point.

Statements are append-only, and all who may write to a store can add some. So one that no trusted
key signed, that is about another package, or that lies under a name that is not its own is skipped.

A move names its registry, channel, card and the move before it (`predecessor`, the SHA-256 of that
one's payload; none for the first). That and the signed times order them; names and dates in a store
do not. Of two moves with the same predecessor the one that was signed earlier counts, and its rival
and all that follow the rival do not. Where a key was revoked, what it signed falls out, and the
moves after it stay.

What this cannot see: that a statement or a move was removed (docs/trust.md).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from pipeline.core.errors import UntrustedError
from pipeline.core.published import Package, Reference, VerdictName
from pipeline.registry.manifest import manifest_bytes
from pipeline.registry.reference import reference_of
from pipeline.registry.store import ENVELOPE, Place, RawStatement, Reader
from pipeline.registry.trust.policy import TrustedKey, TrustPolicy
from pipeline.registry.trust.statements import (
    MODEL_SIGNATURE,
    Statement,
    open_statement,
    warn_skipped,
)

log = logging.getLogger(__name__)

NOT_RUN = frozenset({"checked", "compiled"})
"""Verdicts about an engine that the card did not run: they neither prove it there nor disprove what
ran there before."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Whom a reader trusts, and whether it takes what is unsigned, and what was yanked."""

    policy: TrustPolicy
    allow_unsigned: bool = False
    allow_yanked: bool = False


@dataclass(frozen=True, kw_only=True)
class SignedVerdict:
    """A test result by a trusted key, about a card and the runtime (name, version) that ran there.

    `statement` names the one that has the report; `question` is the key of the acceptance, if any.
    """

    card: str
    runtime: tuple[str, str]
    verdict: VerdictName
    signed_at: str
    statement: str
    signer: TrustedKey
    question: str = ""

    def to_json(self) -> dict[str, Any]:
        same = {name: getattr(self, name) for name in ("card", "verdict", "signed_at", "statement")}
        return {**same, "runtime": " ".join(self.runtime), "signer": self.signer.to_json()}


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A package whose manifest and statements were verified; its files were not read."""

    package: Package  # its folder is `place` as text for a package of a store
    signer: TrustedKey | None = None  # who vouches for it; None if no trusted key does
    builder_id: str = ""  # what ran the build, from trusted provenance; empty without
    built_at: str = ""  # when that provenance was signed
    verdicts: tuple[SignedVerdict, ...] = ()  # newest first, like `yanks` and `statements`
    yanks: tuple[Statement, ...] = ()  # undone ones, too
    statements: tuple[Statement, ...] = ()  # all that count
    ignored: tuple[str, ...] = ()  # what does not count, with the reason
    channel: str = ""  # that was followed, which points here for `cards`; empty for none
    cards: tuple[str, ...] = ()

    def __str__(self) -> str:
        return with_cards(self.place, self.cards)

    @property
    def data(self) -> bytes:
        return manifest_bytes(self.package.manifest)

    @property
    def reference(self) -> Reference:
        return reference_of(self.package)

    @property
    def place(self) -> Place:
        return Place.of(self.reference)

    @property
    def yank(self) -> str | None:
        """Who yanked it, when and why; None if it was not, or if that was undone."""
        if not self.yanks or not (fields := self.yanks[0].fields)["yanked"]:
            return None
        because = f": {fields['reason']}" if fields["reason"] else ""
        return f"by {fields['actor']} at {self.yanks[0].signed_at[:19]}Z{because}"

    @property
    def model_signature(self) -> Statement | None:
        """The newest trusted signature that brings `model.sig`, and its SHA-256; None without."""
        signed = (one for one in self.statements if one.kind == "signature")
        return next((one for one in signed if MODEL_SIGNATURE in one.files), None)

    def proof(self, card: str) -> SignedVerdict | None:
        """What proves the engine on a card: `accepted` there, by the package's own runtime.

        Only the newest verdict of an engine that this card ran with that runtime counts.
        """
        runtime = self.package.manifest["match"]["runtime"]
        wanted = (runtime["name"], runtime["version"])
        for found in self.verdicts:
            if found.card == card and found.verdict not in NOT_RUN and found.runtime == wanted:
                return found if found.verdict == "accepted" else None
        return None

    @property
    def proven_cards(self) -> tuple[str, ...]:
        cards = sorted({found.card for found in self.verdicts})
        return tuple(card for card in cards if self.proof(card))

    def standing(self, card: str) -> SignedVerdict | None:
        """The verdict that says most about a card now: its proof, else the newest one."""
        of_card = (found for found in self.verdicts if found.card == card)
        return self.proof(card) or next(of_card, None)


def with_cards(place: Place, cards: Sequence[str]) -> str:
    """A version, with the cards whose channel points to it."""
    return f"{place} ({', '.join(cards)})" if cards else str(place)


def verify_statements(
    package: Package,
    raws: Sequence[RawStatement],
    policy: TrustPolicy,
    *,
    registry: str | None,
    origin: str,
) -> Resolved:
    """Verify everything that was stated about a package.

    Yanks of another registry than this identity do not count; where there is none, as in a folder
    that was pulled, every trusted yank counts.
    """
    statements: list[Statement] = []
    verdicts: list[SignedVerdict] = []
    yanks: list[Statement] = []
    ignored: list[str] = []
    for raw in raws:
        try:
            found = _open(raw, package, policy, registry)
            if found.id in {one.id for one in statements}:  # written or signed in another way
                raise UntrustedError("says what another one says")
            if found.kind == "test":
                verdicts.append(_verdict(found))
            elif found.kind == "yank":
                if not isinstance(yanked := found.fields.get("yanked"), bool):
                    raise UntrustedError(f"is not a yank: yanked {yanked!r}")
                _ = found.text("actor"), found.text("reason")
                yanks.append(found)
        except UntrustedError as error:
            ignored.append(f"{raw.name}: {error}")
        else:
            statements.append(found)
    if ignored:
        warn_skipped(origin, "a statement", tuple(ignored))
    statements.sort(key=lambda one: (one.signed_at, one.id), reverse=True)
    signature = next((one for one in statements if one.kind == "signature"), None)
    built = ((one, _builder(one.predicate)) for one in statements if one.kind == "provenance")
    wanted = policy.builder_ids
    built_at, builder_id = next(
        ((one.signed_at, by) for one, by in built if not wanted or by in wanted), ("", "")
    )
    return Resolved(
        package=package,
        signer=signature.signer if signature else None,
        builder_id=builder_id,
        built_at=built_at,
        verdicts=tuple(sorted(verdicts, key=lambda one: one.signed_at, reverse=True)),
        # At one and the same time, the one that forbids comes first.
        yanks=tuple(sorted(yanks, key=lambda one: (one.signed_at, one.fields["yanked"]))[::-1]),
        statements=tuple(statements),
        ignored=tuple(ignored),
    )


def require_usable(found: Resolved, terms: Terms, origin: str) -> None:
    """Refuse, as untrusted, what is revoked, yanked, or not signed by a trusted key."""
    digest, policy = found.package.digest, terms.policy
    if digest in policy.revoked_digests:
        raise UntrustedError(f"package {digest[:12]} is revoked; use another version")
    if found.signer is None and not terms.allow_unsigned:
        why = next((one for one in found.ignored if one.startswith("signature-")), "")
        raise UntrustedError(
            f"{origin}: no trusted key signed it ({why or 'it has no signature'}); sign it with "
            "enginesmith sign, add its key to the policy, or accept it with --allow-unsigned"
        )
    if policy.builder_ids and not found.builder_id:
        raise UntrustedError(
            f"{origin} has no trusted provenance by {' or '.join(policy.builder_ids)}, which the "
            "policy requires; build it there, or change builder_ids"
        )
    if (yank := found.yank) and not terms.allow_yanked:
        raise UntrustedError(
            f"{origin} was yanked {yank}; use another version, or take it all the same as "
            f"{found.package.manifest['name']}@sha256:{digest} with --allow-yanked"
        )
    if yank:
        log.warning("%s was yanked %s", origin, yank)


def _open(
    raw: RawStatement, package: Package, policy: TrustPolicy, registry: str | None
) -> Statement:
    found = open_statement(raw.files.get(ENVELOPE, b""), policy)
    if found.name != raw.name:
        raise UntrustedError(f"lies under a name that is not its own, {found.name}")
    if found.digest != package.digest:
        raise UntrustedError(f"is about another package, {found.digest[:12]}")
    if found.kind == "yank" and registry not in {None, found.fields.get("registry")}:
        raise UntrustedError("is a yank of another registry")
    return found


def _verdict(found: Statement) -> SignedVerdict:
    runtime, verdict = found.fields.get("runtime"), found.fields.get("verdict")
    if not isinstance(runtime, dict) or verdict not in get_args(VerdictName):
        raise UntrustedError(f"is not a test result: verdict {verdict!r}")
    return SignedVerdict(
        card=found.part("card"),
        runtime=(str(runtime.get("name")), str(runtime.get("version"))),
        verdict=cast(VerdictName, verdict),
        signed_at=found.signed_at,
        statement=found.name,
        signer=found.signer,
        question=str(found.fields.get("question", "")),
    )


def _builder(predicate: Mapping[str, Any]) -> str:
    try:
        return str(predicate["runDetails"]["builder"]["id"])
    except (KeyError, TypeError):
        return ""


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

    def to_json(self) -> dict[str, str]:
        names = ("channel", "card", "actor", "reason", "signed_at")
        return {
            "reference": str(self.reference),
            "digest": self.reference.digest,
            **{name: getattr(self, name) for name in names},
            "signer": self.signer.name,
        }


@dataclass(frozen=True, kw_only=True)
class Channel:
    """A channel of one card: the moves that count, oldest first; at least one."""

    name: str
    card: str
    moves: tuple[Move, ...]

    @property
    def newest(self) -> Move:
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
