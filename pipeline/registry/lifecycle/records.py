"""The two things that are signed here: the move of a channel, and a yank.

Both are DSSE envelopes around RFC 8785 canonical JSON, each with a payload type of its own, so that
neither passes for the other, nor for a manifest. Their fields are exactly those below: a rule that
an old reader does not know could be the one that says "not any more".
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import rfc8785

from pipeline.core.errors import Fault, RecipeError, UntrustedError
from pipeline.core.values import Reference
from pipeline.registry.reference import check_digest, check_part
from pipeline.registry.signing.envelope import parse_envelope, sign_envelope
from pipeline.registry.signing.keys import SigningKey
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.statements import Pointer

SCHEMA = 1
MOVE_TYPE = "application/vnd.enginesmith.move.v1+json"
YANK_TYPE = "application/vnd.enginesmith.yank.v1+json"
_MAX_TEXT = 500
"""Characters of an actor or a reason: a line or two for people."""


@dataclass(frozen=True, kw_only=True)
class Author:
    """Who acts: with which key, by which name, and why.

    Attributes:
        key: Signs.
        actor: For people; the key is what counts.
        reason: For people; may be empty.
    """

    key: SigningKey
    actor: str
    reason: str = ""

    def __post_init__(self) -> None:
        for kind, text in (("actor", self.actor), ("reason", self.reason)):
            if fault := _text_fault(text):
                raise RecipeError([Fault(kind, fault)])


@dataclass(frozen=True, kw_only=True)
class Move:
    """One move of a channel.

    Attributes:
        channel: Such as `stable`.
        card: As NVML calls it, spaces as dashes.
        reference: Where the channel points from now on.
        seq: 1 for the first move, then one more for each.
        prev: SHA-256 (hex) of the bytes of the envelope before; None for the first.
        actor: Who says to have moved it.
        reason: Why; may be empty.
        at: When, by the mover's clock: RFC 3339, UTC.
        restart: What lies before was given up: it counts for nothing, and is not checked.
        signer: Whose key signed it, as the policy calls it; empty before it is signed.
        sha256: Of the envelope's bytes; empty before it is signed.
    """

    channel: str
    card: str
    reference: Reference
    seq: int
    prev: str | None
    actor: str
    reason: str
    at: str
    restart: bool = False
    signer: str = ""
    sha256: str = ""

    @property
    def file(self) -> str:
        """Name of its file in the log."""
        return f"{self.channel}.{self.card}.{self.seq:06d}.dsse.json"

    def to_json(self) -> dict[str, Any]:
        """What is signed."""
        value: dict[str, Any] = {
            "schema": SCHEMA,
            "name": self.reference.name,
            "variant": self.reference.variant,
            "channel": self.channel,
            "card": self.card,
            "version": self.reference.version,
            "digest": self.reference.digest,
            "seq": self.seq,
            "prev": self.prev,
            "actor": self.actor,
            "reason": self.reason,
            "at": self.at,
        }
        return {**value, "restart": True} if self.restart else value

    def pointer_bytes(self) -> bytes:
        """The readable copy: a channel pointer, and which move it copies."""
        pointer = Pointer(
            channel=self.channel, card=self.card, reference=self.reference, seq=self.seq
        )
        told = {"actor": self.actor, "reason": self.reason, "at": self.at, "move": self.file}
        value = {**json.loads(pointer.to_bytes()), **told}
        return (json.dumps(value, indent=1) + "\n").encode()


@dataclass(frozen=True, kw_only=True)
class Yank:
    """A package was yanked, or the yank was undone.

    Attributes:
        reference: The package.
        seq: 1 for the first yank of a package, then one more for each, undone or not.
        yanked: False if this undoes a yank.
        actor: Who says to have done it.
        reason: Why.
        at: When, by that machine's clock: RFC 3339, UTC.
        signer: Whose key signed it; empty before it is signed.
    """

    reference: Reference
    seq: int
    yanked: bool
    actor: str
    reason: str
    at: str
    signer: str = ""

    def to_json(self) -> dict[str, Any]:
        """What is signed."""
        return {
            "schema": SCHEMA,
            "name": self.reference.name,
            "variant": self.reference.variant,
            "version": self.reference.version,
            "digest": self.reference.digest,
            "seq": self.seq,
            "yanked": self.yanked,
            "actor": self.actor,
            "reason": self.reason,
            "at": self.at,
        }


def sign_record(record: Move | Yank, key: SigningKey) -> bytes:
    """The envelope of a record."""
    payload_type = MOVE_TYPE if isinstance(record, Move) else YANK_TYPE
    return sign_envelope(rfc8785.dumps(record.to_json()), payload_type, key)


def read_move(data: bytes, policy: TrustPolicy, origin: str) -> Move:
    """A move whose signature holds.

    Args:
        data: The envelope.
        policy: Whom to believe.
        origin: Where it comes from, for messages.

    Raises:
        UntrustedError: It is no move, or nobody who may signed it.
    """
    value, signer = _open(data, MOVE_TYPE, policy, origin)
    try:
        move = Move(
            channel=check_part("channel", value["channel"]),
            card=check_part("card", value["card"]),
            reference=_reference(value),
            seq=_count(value["seq"]),
            prev=None if value["prev"] is None else check_digest(value["prev"]),
            actor=_text(value["actor"]),
            reason=_text(value["reason"]),
            at=_text(value["at"]),
            restart=_flag(value.get("restart", False)),
            signer=signer,
            sha256=hashlib.sha256(data).hexdigest(),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecipeError) as error:
        raise UntrustedError(f"{origin} is not a move of a channel: {error}") from error
    _require_exact(move, value, origin)
    return move


def read_yank(data: bytes, policy: TrustPolicy, origin: str) -> Yank:
    """A yank whose signature holds.

    A yank forbids, so it outlasts the certificate that signed it; what undoes one does not.

    Raises:
        UntrustedError: It is no yank, or nobody who may signed it.
    """
    try:
        value, signer = _open(data, YANK_TYPE, policy, origin)
    except UntrustedError:
        value, signer = _open(data, YANK_TYPE, policy, origin, expired_too=True)
        if value.get("yanked") is not True:
            raise
    try:
        yank = Yank(
            reference=_reference(value),
            seq=_count(value["seq"]),
            yanked=_flag(value["yanked"]),
            actor=_text(value["actor"]),
            reason=_text(value["reason"]),
            at=_text(value["at"]),
            signer=signer,
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecipeError) as error:
        raise UntrustedError(f"{origin} is not a yank: {error}") from error
    _require_exact(yank, value, origin)
    return yank


def now() -> str:
    """RFC 3339 in UTC, whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def actor_of(environ: Mapping[str, str]) -> str:
    """Who acts, for people: `$ENGINESMITH_ACTOR`, else CI's user, else the login name."""
    for name in ("ENGINESMITH_ACTOR", "GITHUB_ACTOR", "GITLAB_USER_LOGIN"):
        if environ.get(name):
            return environ[name]
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user that /etc/passwd does not know
        return f"uid-{os.getuid()}"


def _open(
    data: bytes, payload_type: str, policy: TrustPolicy, origin: str, *, expired_too: bool = False
) -> tuple[dict[str, Any], str]:
    """The signed value, and who signed it."""
    envelope = parse_envelope(data, origin)
    if envelope.payload_type != payload_type:
        raise UntrustedError(
            f"{origin} holds a {envelope.payload_type[:80]!r}, wanted {payload_type}"
        )
    signer = policy.signer(envelope, "channels", origin, expired_too=expired_too)
    try:
        value = json.loads(envelope.payload)
        if not isinstance(value, dict) or rfc8785.dumps(value) != envelope.payload:
            raise ValueError("it is not a canonical JSON object")
    except (ValueError, RecursionError) as error:
        raise UntrustedError(f"{origin} cannot be read: {error}") from error
    if value.get("schema") != SCHEMA:
        raise UntrustedError(
            f"{origin} has schema {value.get('schema')!r}, this program reads {SCHEMA}; upgrade it"
        )
    return value, signer.name


def _require_exact(record: Move | Yank, value: Mapping[str, Any], origin: str) -> None:
    if unknown := value.keys() - record.to_json().keys():
        raise UntrustedError(
            f"{origin} has a field {min(unknown)!r} that this program does not know; upgrade it"
        )


def _reference(value: Mapping[str, Any]) -> Reference:
    return Reference(
        name=check_part("name", value["name"]),
        variant=check_part("variant", value["variant"]),
        version=check_part("version", value["version"]),
        digest=check_digest(value["digest"]),
    )


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"seq {value!r} is not a number from 1 on")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    if fault := _text_fault(value):
        raise ValueError(fault)
    return value


def _text_fault(text: str) -> str:
    """Why this would not be fit to show on a terminal; empty if it is."""
    if len(text) > _MAX_TEXT:
        return f"has {len(text)} characters, at most {_MAX_TEXT} are allowed"
    return "" if text.isprintable() else "has a line break or an unprintable character"
