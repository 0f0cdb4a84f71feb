"""Statements: everything that is signed here is one of these, in a DSSE envelope.

    raw = sign_statement("test", digest, {"card": card, ...}, key, files={"report.json": data})
    statement = open_statement(raw.envelope, policy)          # trusted, or UntrustedError
    raw.name == statement.name                                # test-<16 hex of SHA-256(envelope)>

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
yanks and moves are a registry's own. This module reads them; signing.py makes them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from pipeline.core.errors import CorruptError, RecipeError, UntrustedError
from pipeline.core.published import Reference
from pipeline.registry.reference import Part, check_digest, check_part
from pipeline.registry.store import MAX_ENVELOPE_BYTES, Place, Store, is_attachment_name
from pipeline.registry.trust.policy import PublicKey, Role, TrustedKey, TrustPolicy

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey

log = logging.getLogger(__name__)

Kind = Literal["signature", "provenance", "test", "yank", "move"]
# Kind -> type of the predicate, and the right that its signer needs. Types of ours are identifiers,
# not pages.
KINDS: Mapping[Kind, tuple[str, Role]] = {
    "signature": ("https://enginesmith.dev/signature/v1", "builds"),
    "provenance": ("https://slsa.dev/provenance/v1", "builds"),
    "test": ("https://in-toto.io/attestation/test-result/v0.1", "verdicts"),
    "yank": ("https://enginesmith.dev/yank/v1", "channels"),
    "move": ("https://enginesmith.dev/move/v1", "channels"),
}
SCHEMA = 1
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
OURS = "enginesmith_statement"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
"""Payload type of an in-toto statement (in-toto attestation spec 1.0, "Envelope"); the statement
itself says of which kind it is, and the signature covers that."""
SIGNED_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"
MODEL_SIGNATURE = "model.sig"
"""File beside a signature: the OpenSSF model signature of `engine/` (signing.py)."""
_MAX_TEXT = 500
"""Characters of an actor or a reason: a line or two for people."""
_MAX_FILES = 16
_MAX_KEYIDS = 8
"""Signatures of one envelope that are looked at: ours have one."""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A statement that a trusted key signed."""

    kind: Kind
    digest: str  # the package that it is about
    signed_at: str  # RFC 3339, UTC, microseconds: text that sorts as time
    signer: TrustedKey
    fields: Mapping[str, Any]  # of its kind; `text`, `part` and `reference` check their form
    files: Mapping[str, str]  # name -> SHA-256 (hex) of every file beside the envelope
    predicate: Mapping[str, Any]
    id: str  # SHA-256 (hex) of the payload
    envelope: bytes = field(compare=False)  # what was opened

    @property
    def name(self) -> str:
        return f"{self.kind}-{hashlib.sha256(self.envelope).hexdigest()[:16]}"

    def text(self, field: str) -> str:
        """A field that people read; an UntrustedError unless it is one printable line."""
        value = self.fields.get(field)
        if not isinstance(value, str) or text_fault(value):
            raise UntrustedError(f"its {field} is not one printable line of text")
        return value

    def part(self, field: Part) -> str:
        """A field that is part of a reference; an UntrustedError if it breaks the grammar."""
        try:
            return check_part(field, self.text(field))
        except RecipeError as error:
            raise UntrustedError(f"its {field} cannot be used: {error}") from error

    def reference(self) -> Reference:
        """The package that a yank or a move names; an UntrustedError if it names none."""
        name, variant, version = self.part("name"), self.part("variant"), self.part("version")
        return Reference(name=name, variant=variant, version=version, digest=self.digest)


def text_fault(text: str) -> str:
    """Why a text is not fit for one line on a terminal; empty if it is."""
    if len(text) > _MAX_TEXT:
        return f"has {len(text)} characters, at most {_MAX_TEXT} are allowed"
    return "" if text.isprintable() else "has a line break or an unprintable character"


def open_statement(data: bytes, policy: TrustPolicy) -> Statement:
    """Verify an envelope: the signature, the signer's right and the form, else UntrustedError."""
    envelope = parse_envelope(data)
    try:
        value = json.loads(envelope.payload)
        ours = value["predicate"][OURS]
        kind: Kind = ours["kind"]
        predicate_type, role = KINDS[kind]
        (subject,) = value["subject"]
        if (value["_type"], value["predicateType"]) != (STATEMENT_TYPE, predicate_type):
            raise ValueError(f"a {kind} with predicateType {value['predicateType']!r}")
        if ours["schema"] != SCHEMA:
            raise ValueError(f"schema {ours['schema']!r}; this program reads {SCHEMA}, upgrade it")
        digest, signed_at, files = subject["digest"]["sha256"], ours["signed_at"], ours["files"]
        check_digest(digest)
        if datetime.strptime(signed_at, SIGNED_TIME).strftime(SIGNED_TIME) != signed_at:
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
        signer=signer_of(envelope, policy, role),
        fields=ours,
        files=files,
        predicate=value["predicate"],
        id=hashlib.sha256(envelope.payload).hexdigest(),
        envelope=data,
    )


def parse_envelope(data: bytes) -> Envelope:
    """Read a DSSE envelope (github.com/secure-systems-lab/dsse, version 1) of an in-toto statement.

    Its signatures are not verified yet; an UntrustedError if it is none.
    """
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import FormatError

    try:
        if len(data) > MAX_ENVELOPE_BYTES:
            raise ValueError(f"more than {MAX_ENVELOPE_BYTES} bytes")
        envelope = Envelope.from_dict(json.loads(data))
        if envelope.payload_type != PAYLOAD_TYPE:
            raise ValueError(f"its payloadType is not {PAYLOAD_TYPE}")
        if not all(isinstance(keyid, str) for keyid in envelope.signatures):
            raise ValueError("a keyid is not text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FormatError) as error:
        fault = f"{type(error).__name__}: {str(error)[:200]!r}"
        raise UntrustedError(f"not a DSSE envelope ({fault})") from error
    return envelope


def signer_of(envelope: Envelope, policy: TrustPolicy, role: Role) -> TrustedKey:
    """The key that signed an envelope, if the policy lets it; an UntrustedError says why not."""
    from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError

    reasons = []
    keyids = [keyid for keyid in envelope.signatures if re.fullmatch("[0-9a-f]{64}", keyid)]
    for keyid in keyids[:_MAX_KEYIDS]:
        key, reason = policy.find(keyid, role)
        if key is not None:
            with contextlib.suppress(UnverifiedSignatureError, VerificationError, ValueError):
                envelope.verify([_library_key(key.key)], 1)
                return key
        reasons.append(reason or f"the signature by {keyid[:12]} does not match its content")
    raise UntrustedError("; ".join(reasons) or "it has no signature")


@functools.lru_cache(maxsize=64)
def _library_key(key: PublicKey) -> SSlibKey:
    """A key as the library wants it, parsed once for all that it signed."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    return SSlibKey.from_crypto(load_pem_public_key(key.pem), keyid=key.keyid)


def verified_files(
    statement: Statement, store: Store, place: Place, *, some: bool = False
) -> dict[str, bytes]:
    """The files of a statement; a CorruptError unless each is what was signed.

    All must be there but for `some`: a copy in a cache has none.
    """
    found = store.read_attachments(place, statement.name, statement.files)
    for file, sha256 in statement.files.items():
        data = found.get(file)
        if some if data is None else hashlib.sha256(data).hexdigest() == sha256:
            continue
        state = "is missing" if data is None else "is not what was signed"
        raise CorruptError(
            f"{store.url}: {file} of {statement.name} of {place} {state}; do not read it, and "
            "remove the statement"
        )
    return found


def whole_statements(
    statements: Iterable[Statement], store: Store, place: Place
) -> Iterator[tuple[Statement, dict[str, bytes]]]:
    """Statements with their files; one whose files are damaged or gone is left out, and said."""
    for one in statements:
        try:
            yield one, verified_files(one, store, place)
        except CorruptError as error:
            log.warning("%s of %s is left out: %s", one.name, place, error)


@functools.cache
def warn_skipped(origin: str, what: str, reasons: tuple[str, ...]) -> None:
    """Warn of statements that do not count, once for all and only once in a process."""
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    log.warning("%s: %s does not count: %s%s", origin, what, reasons[0], more)
