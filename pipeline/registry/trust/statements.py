"""Statements: everything that is signed here is one of these, in a DSSE envelope.

    raw = sign_statement("test", digest, {"card": card, ...}, key, files={"report.json": data})
    statement = open_statement(raw.envelope, policy)          # trusted, or UntrustedError
    raw.name == statement.name                                # test-<16 hex of SHA-256(payload)>

The payload is an in-toto statement (attestation framework, version 1) whose subject is a package:
the SHA-256 of its `manifest.json`. Its predicate is of a known type where there is one, so that
other tools read it (SLSA provenance v1, in-toto test result v0.1), and always holds
`enginesmith_statement`: the kind, when it was signed, the SHA-256 of every file beside the envelope
and the fields of its kind:

    signature    none: this key vouches for the package
    provenance   none: the predicate is SLSA's
    test         card, runtime {name, version}, verdict
    yank         registry, name, variant, version, yanked, actor, reason
    move         registry, name, variant, version, channel, card, predecessor, actor, reason

Signatures, provenance and test results hold wherever the package lies, so `copy` carries them;
yanks and moves are a registry's own. Of several, the one with the latest signed time counts; names
and dates in a store count for nothing.
"""

from __future__ import annotations

import functools
import getpass
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import rfc8785

from pipeline.core.errors import CorruptError, Fault, RecipeError, UntrustedError
from pipeline.core.values import Reference
from pipeline.registry.reference import Part, check_digest, check_part
from pipeline.registry.store import ENVELOPE, Place, RawStatement, is_attachment_name
from pipeline.registry.trust.envelope import parse_envelope, sign_envelope
from pipeline.registry.trust.keys import SigningKey
from pipeline.registry.trust.policy import Role, TrustedKey, TrustPolicy

log = logging.getLogger(__name__)

Kind = Literal["signature", "provenance", "test", "yank", "move"]
SCHEMA = 1
_STATEMENT = "https://in-toto.io/Statement/v1"
_OURS = "enginesmith_statement"
# Kind -> type of the predicate, and the right that its signer needs. Types of ours are identifiers,
# not pages.
_KINDS: Mapping[Kind, tuple[str, Role]] = {
    "signature": ("https://enginesmith.dev/signature/v1", "builds"),
    "provenance": ("https://slsa.dev/provenance/v1", "builds"),
    "test": ("https://in-toto.io/attestation/test-result/v0.1", "verdicts"),
    "yank": ("https://enginesmith.dev/yank/v1", "channels"),
    "move": ("https://enginesmith.dev/move/v1", "channels"),
}
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"
_MAX_TEXT = 500
"""Characters of an actor or a reason: a line or two for people."""
_MAX_FILES = 16


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A statement that a trusted key signed.

    Attributes:
        kind: What it states.
        digest: The package that it is about.
        signed_at: RFC 3339, UTC, microseconds: text that sorts as time.
        signer: Of the policy.
        fields: Of its kind; see the module. Their form is checked by whoever uses them, by `text`,
            `part` and `place`.
        files: Name -> SHA-256 (hex) of every file beside the envelope.
        predicate: The whole predicate.
        id: SHA-256 (hex) of the payload.
    """

    kind: Kind
    digest: str
    signed_at: str
    signer: TrustedKey
    fields: Mapping[str, Any]
    files: Mapping[str, str]
    predicate: Mapping[str, Any]
    id: str

    @property
    def name(self) -> str:
        """Under which a store keeps it."""
        return f"{self.kind}-{self.id[:16]}"

    def text(self, field: str) -> str:
        """A field that people read: one line, printable.

        Raises:
            UntrustedError: It is not that.
        """
        value = self.fields.get(field)
        if not isinstance(value, str) or text_fault(value):
            raise UntrustedError(f"its {field} is not one printable line of text")
        return value

    def part(self, field: Part) -> str:
        """A field that is part of a reference.

        Raises:
            UntrustedError: It breaks the grammar.
        """
        try:
            return check_part(field, self.text(field))
        except RecipeError as error:
            raise UntrustedError(f"its {field} cannot be used: {error}") from error

    def reference(self) -> Reference:
        """The package that a yank or a move names.

        Raises:
            UntrustedError: It names none.
        """
        return Reference(
            name=self.part("name"),
            variant=self.part("variant"),
            version=self.part("version"),
            digest=self.digest,
        )


@dataclass(frozen=True, kw_only=True)
class Author:
    """Who yanks a package or moves a channel: with which key, by which name, and why.

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
            if fault := text_fault(text):
                raise RecipeError([Fault(kind, fault)])


def actor_of(environ: Mapping[str, str]) -> str:
    """Who acts, for people: `$ENGINESMITH_ACTOR`, else CI's user, else the login name."""
    for name in ("ENGINESMITH_ACTOR", "GITHUB_ACTOR", "GITLAB_USER_LOGIN"):
        if environ.get(name):
            return environ[name]
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user that /etc/passwd does not know
        return f"uid-{os.getuid()}"


def text_fault(text: str) -> str:
    """Why a text is not fit for one line on a terminal; empty if it is."""
    if len(text) > _MAX_TEXT:
        return f"has {len(text)} characters, at most {_MAX_TEXT} are allowed"
    return "" if text.isprintable() else "has a line break or an unprintable character"


def sign_statement(
    kind: Kind,
    digest: str,
    fields: Mapping[str, Any],
    key: SigningKey,
    *,
    files: Mapping[str, bytes] | None = None,
    predicate: Mapping[str, Any] | None = None,
    after: str = "",
) -> RawStatement:
    """Sign a statement.

    Args:
        kind: What it states.
        digest: The package.
        fields: Of its kind; JSON values.
        key: Signs.
        files: What goes beside the envelope.
        predicate: Of a type that other tools read; JSON values.
        after: A time that the signed one must be later than, should this clock be behind.
    """
    beside = dict(files or {})
    ours = {
        "schema": SCHEMA,
        "kind": kind,
        "signed_at": now_text(after),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in beside.items()},
        **fields,
    }
    payload = rfc8785.dumps(
        {
            "_type": _STATEMENT,
            "subject": [{"name": "manifest.json", "digest": {"sha256": digest}}],
            "predicateType": _KINDS[kind][0],
            "predicate": {**(predicate or {}), _OURS: ours},
        }
    )
    name = f"{kind}-{hashlib.sha256(payload).hexdigest()[:16]}"
    return RawStatement(name=name, files={ENVELOPE: sign_envelope(payload, key), **beside})


def open_statement(envelope: bytes, policy: TrustPolicy) -> Statement:
    """Verify a statement: its signature, its signer's right, and its form.

    Raises:
        UntrustedError: It is none, or no key that may signed it.
    """
    parsed = parse_envelope(envelope)
    try:
        value = json.loads(parsed.payload)
        ours = value["predicate"][_OURS]
        kind: Kind = ours["kind"]
        predicate_type, role = _KINDS[kind]
        (subject,) = value["subject"]
        if (value["_type"], value["predicateType"]) != (_STATEMENT, predicate_type):
            raise ValueError(f"a {kind} with predicateType {value['predicateType']!r}")
        if ours["schema"] != SCHEMA:
            raise ValueError(f"schema {ours['schema']!r}; this program reads {SCHEMA}, upgrade it")
        digest, signed_at, files = subject["digest"]["sha256"], ours["signed_at"], ours["files"]
        check_digest(digest)
        if datetime.strptime(signed_at, _TIME).strftime(_TIME) != signed_at:
            raise ValueError(f"signed_at {signed_at!r}")
        if len(files) > _MAX_FILES:
            raise ValueError(f"{len(files)} files")
        for file, sha256 in files.items():
            if not is_attachment_name(file):
                raise ValueError(f"a file {file!r}")
            check_digest(sha256)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RecipeError) as error:
        raise UntrustedError(f"not a statement of ours: {str(error)[:200]!r}") from error
    return Statement(
        kind=kind,
        digest=digest,
        signed_at=signed_at,
        signer=policy.signer(parsed, role),
        fields=ours,
        files=files,
        predicate=value["predicate"],
        id=hashlib.sha256(parsed.payload).hexdigest(),
    )


def sign_again(one: Statement, key: SigningKey, files: Mapping[str, bytes]) -> RawStatement:
    """The same statement by another key, signed now."""
    ours = {"schema", "kind", "signed_at", "files"}
    fields = {name: value for name, value in one.fields.items() if name not in ours}
    predicate = {name: value for name, value in one.predicate.items() if name != _OURS}
    return sign_statement(one.kind, one.digest, fields, key, files=files, predicate=predicate)


def verified_files(statement: Statement, raw: RawStatement) -> dict[str, bytes]:
    """The files of a statement that are what was signed.

    Raises:
        CorruptError: One is missing or differs; names it.
    """
    for file, sha256 in statement.files.items():
        data = raw.files.get(file)
        if data is None or hashlib.sha256(data).hexdigest() != sha256:
            state = "is missing" if data is None else "is not what was signed"
            raise CorruptError(
                f"{file} of statement {statement.name} {state}; remove the statement"
            )
    return {file: raw.files[file] for file in statement.files}


@functools.cache
def warn_skipped(origin: str, what: str, reasons: tuple[str, ...]) -> None:
    """Warn of statements that do not count, once for all and only once in a process."""
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    log.warning("%s: %s does not count: %s%s", origin, what, reasons[0], more)


def now_text(after: str = "") -> str:
    """The time now, as statements state it; a microsecond after `after` if that is not past yet."""
    now = datetime.now(UTC)
    if after and now.strftime(_TIME) <= after:
        now = datetime.strptime(after, _TIME).replace(tzinfo=UTC) + timedelta(microseconds=1)
    return now.strftime(_TIME)


def place_fields(reference: Reference) -> dict[str, str]:
    """The fields of a yank or a move that name its package."""
    place = Place.of(reference)
    return {"name": place.name, "variant": place.variant, "version": place.version}
