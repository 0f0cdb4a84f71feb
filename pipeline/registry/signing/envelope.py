"""DSSE envelopes (github.com/secure-systems-lab/dsse, version 1): bytes, their type, signatures.

    data = sign_envelope(manifest_bytes, MANIFEST_TYPE, key)
    envelope = parse_envelope(data, "manifest.dsse.json")
    envelope.verifies(public_key)

The signature covers the type too, so that a signed manifest never passes for a signed verdict.

A signer's certificates travel as `cert` of the entry in `signatures`, PEM, as those of in-toto's
layouts do: DSSE readers look at `keyid` and `sig` only, the envelope stays one file, and wherever
it is copied the certificates go along. The signature does not cover them and need not: they must
be for the key that signed, and lead to an authority of the reader's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import rfc8785

from pipeline.core.errors import UntrustedError
from pipeline.registry.signing.keys import PublicKey, SigningKey

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope as DsseEnvelope

MANIFEST_TYPE = "application/vnd.enginesmith.manifest.v1+json"
"""Payload type of the bytes of `manifest.json`."""
STATEMENT_TYPE = "application/vnd.in-toto+json"
"""Payload type of an in-toto statement (in-toto attestation spec 1.0, "Envelope")."""
MAX_ENVELOPE_BYTES = 8 << 20
"""A manifest of at most 4 MiB in base64, and room for signatures."""
_CERT = "cert"


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A parsed envelope, not yet trusted.

    Attributes:
        payload: What is signed.
        payload_type: What it is.
        keyids: Who says to have signed it.
        certificates: Key id -> the PEM that came with its signature; not read yet, and only those
            that brought some.
    """

    payload: bytes
    payload_type: str
    keyids: tuple[str, ...]
    parsed: DsseEnvelope
    certificates: Mapping[str, bytes] = field(default_factory=dict)

    def verifies(self, key: PublicKey) -> bool:
        """Whether this key signed exactly this payload as exactly this type."""
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
        from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
        from securesystemslib.signer import SSlibKey

        ours = SSlibKey.from_crypto(load_pem_public_key(key.pem), keyid=key.keyid)
        try:
            self.parsed.verify([ours], 1)
        except (UnverifiedSignatureError, VerificationError, ValueError):
            return False
        return True


def sign_envelope(payload: bytes, payload_type: str, key: SigningKey) -> bytes:
    """Sign bytes.

    The nonce is derived from key and content (RFC 6979), so that signing the same again gives the
    same bytes; where the OpenSSL below is older than 3.2, it is random, and both verify.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA256
    from securesystemslib.dsse import Envelope as DsseEnvelope
    from securesystemslib.signer import Signature

    envelope = DsseEnvelope(payload, payload_type, {})
    try:
        signature = key.private.sign(envelope.pae(), ECDSA(SHA256(), deterministic_signing=True))
    except UnsupportedAlgorithm:
        signature = key.private.sign(envelope.pae(), ECDSA(SHA256()))
    keyid = key.public.keyid
    more = {_CERT: key.certificates.decode()} if key.certificates else {}
    envelope.signatures[keyid] = Signature(keyid, signature.hex(), more)
    return rfc8785.dumps(envelope.to_dict())


def parse_envelope(data: bytes, origin: str) -> Envelope:
    """Read an envelope; checks its form, not its signatures.

    Raises:
        UntrustedError: It is none.
    """
    from securesystemslib.dsse import Envelope as DsseEnvelope
    from securesystemslib.exceptions import FormatError

    try:
        parsed = DsseEnvelope.from_dict(json.loads(data))
        if not isinstance(parsed.payload_type, str):
            raise ValueError("its payloadType is no text")
        if not all(isinstance(keyid, str) for keyid in parsed.signatures):
            raise ValueError("a keyid is no text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FormatError) as error:
        raise UntrustedError(
            f"{origin} is not a DSSE envelope ({type(error).__name__}: {error}); sign again"
        ) from error
    return Envelope(
        payload=parsed.payload,
        payload_type=parsed.payload_type,
        keyids=tuple(parsed.signatures),
        parsed=parsed,
        certificates={
            keyid: cert.encode()
            for keyid, one in parsed.signatures.items()
            if isinstance(cert := one.unrecognized_fields.get(_CERT), str)
        },
    )
