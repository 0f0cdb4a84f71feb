"""DSSE envelopes (github.com/secure-systems-lab/dsse, version 1): bytes, their type, signatures.

data = sign_envelope(payload, PAYLOAD_TYPE, key)
envelope = parse_envelope(data)
envelope.verifies(public_key)
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import rfc8785

from pipeline.core.errors import UntrustedError
from pipeline.registry.store import MAX_ENVELOPE_BYTES
from pipeline.registry.trust.keys import PublicKey, SigningKey

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope as DsseEnvelope
    from securesystemslib.signer import SSlibKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
"""Payload type of an in-toto statement (in-toto attestation spec 1.0, "Envelope"); the statement
itself says of which kind it is, and the signature covers that."""
_KEYID = re.compile(r"[0-9a-f]{64}")
_MAX_KEYIDS = 8
"""Signatures of one envelope that are looked at: ours have one."""


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A parsed envelope, not yet trusted.

    Attributes:
        payload: What is signed.
        keyids: The keys that it claims to be signed with.
    """

    payload: bytes
    keyids: tuple[str, ...]
    parsed: DsseEnvelope

    def verifies(self, key: PublicKey) -> bool:
        """Whether this key signed exactly this payload."""
        from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError

        try:
            self.parsed.verify([_library_key(key)], 1)
        except (UnverifiedSignatureError, VerificationError, ValueError):
            return False
        return True


@functools.lru_cache(maxsize=64)
def _library_key(key: PublicKey) -> SSlibKey:
    """A key as the library wants it, parsed once for all that it signed."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    return SSlibKey.from_crypto(load_pem_public_key(key.pem), keyid=key.keyid)


def sign_envelope(payload: bytes, key: SigningKey) -> bytes:
    """Sign the bytes of an in-toto statement.

    The nonce is derived from key and content (RFC 6979), so that signing the same again gives the
    same bytes; where the OpenSSL below is older than 3.2, it is random, and both verify.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA256
    from securesystemslib.dsse import Envelope as DsseEnvelope
    from securesystemslib.signer import Signature

    envelope = DsseEnvelope(payload, PAYLOAD_TYPE, {})
    try:
        signature = key.private.sign(envelope.pae(), ECDSA(SHA256(), deterministic_signing=True))
    except UnsupportedAlgorithm:
        signature = key.private.sign(envelope.pae(), ECDSA(SHA256()))
    keyid = key.public.keyid
    envelope.signatures[keyid] = Signature(keyid, signature.hex())
    return rfc8785.dumps(envelope.to_dict())


def parse_envelope(data: bytes) -> Envelope:
    """Read an envelope of an in-toto statement; checks its form, not its signatures.

    Raises:
        UntrustedError: It is none.
    """
    from securesystemslib.dsse import Envelope as DsseEnvelope
    from securesystemslib.exceptions import FormatError

    try:
        if len(data) > MAX_ENVELOPE_BYTES:
            raise ValueError(f"more than {MAX_ENVELOPE_BYTES} bytes")
        parsed = DsseEnvelope.from_dict(json.loads(data))
        if parsed.payload_type != PAYLOAD_TYPE:
            raise ValueError(f"its payloadType is not {PAYLOAD_TYPE}")
        keyids = [keyid for keyid in parsed.signatures if _KEYID.fullmatch(keyid)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FormatError) as error:
        fault = f"{type(error).__name__}: {str(error)[:200]!r}"
        raise UntrustedError(f"not a DSSE envelope ({fault})") from error
    return Envelope(payload=parsed.payload, keyids=tuple(keyids[:_MAX_KEYIDS]), parsed=parsed)
