"""Certificates: an authority says whose a signing key is, and until when.

A signer shows a leaf certificate for its key, and intermediate ones if the authority has any. A
reader believes none of them by itself: the chain must end at the one authority that its policy
names, never at the system's roots, and never at a root that travels along.

A leaf here has a P-256 key like every signing key, exactly one name (a URI, an e-mail address or a
DNS name; the common name is not looked at), and may make digital signatures. Chains are checked by
`cryptography.x509.verification`, so the light install suffices. The profile is that for the web,
but where a certificate lists extended usages, code signing must be among them.
"""

from __future__ import annotations

import base64
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.core.errors import CorruptError, Fault, RecipeError, UntrustedError
from pipeline.registry.disk import disk_errors, read_bounded
from pipeline.registry.signing.keys import CERTIFICATE_PATH, KEY_PATH, PublicKey, SigningKey

if TYPE_CHECKING:
    from cryptography import x509

    _Extension = TypeVar("_Extension", bound=x509.ExtensionType)

MAX_INTERMEDIATES = 3
"""Certificates between a leaf and the authority; public hierarchies have one or two."""
MAX_CHAIN_BYTES = 16 << 10
"""PEM of a leaf and its intermediates: four with RSA-4096 keys have some 9 KiB."""


class CertificateError(ValueError):
    """Why a certificate does not count; reads on after "the certificate"."""


class ExpiredError(CertificateError):
    """It counted once."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What a signer shows, well formed and not yet believed.

    Attributes:
        leaf: Of the signing key.
        intermediates: Between the leaf and an authority, in any order; may be empty.
        key: The leaf's.
        identity: The leaf's one name, as OpenSSL writes it: `URI:…`, `email:…` or `DNS:…`.
    """

    leaf: x509.Certificate
    intermediates: tuple[x509.Certificate, ...]
    key: PublicKey
    identity: str


def parse_chain(data: bytes) -> Chain:
    """Read a leaf and its intermediates in PEM; looks at no date and at no signature.

    Raises:
        CertificateError: It is none, is too long, or its leaf is not one that may sign here.
    """
    certificates = _certificates(data)
    leaf, *intermediates = certificates
    if len(intermediates) > MAX_INTERMEDIATES:
        raise CertificateError(
            f"comes with {len(intermediates)} more; at most {MAX_INTERMEDIATES} may lie between it "
            "and the authority"
        )
    key = _leaf_key(leaf)
    _require_signer(leaf)
    return Chain(
        leaf=leaf,
        intermediates=tuple(intermediates),
        key=replace(key, certificates=b"".join(map(_pem, certificates))),
        identity=_identity(leaf),
    )


def parse_authority(data: bytes) -> x509.Certificate:
    """Read the one certificate of an authority in PEM.

    Raises:
        CertificateError: It is none, or not that of an authority.
    """
    from cryptography import x509

    found = _certificates(data)
    if len(found) != 1:
        raise CertificateError(f"is one of {len(found)} in this PEM; name one authority per entry")
    constraints = _extension(found[0], x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise CertificateError(
            f"of {subject(found[0])} is not an authority's (basicConstraints says no CA:TRUE); to "
            "trust one key, name its public key under keys"
        )
    return found[0]


def require_issued(chain: Chain, authority: x509.Certificate, now: datetime) -> list[PublicKey]:
    """Check that an authority stands, or stood, behind a chain.

    Apart from `require_current`, and to be asked first: what to do about an old certificate is no
    advice about a forged one.

    Args:
        chain: What the signer showed.
        authority: The only one that is believed.
        now: With time zone; for a leaf that is not valid now, its nearest day counts.

    Returns:
        The keys of the whole chain, the leaf's first: each of them can be revoked.

    Raises:
        CertificateError: It does not.
    """
    begin, end = chain.leaf.not_valid_before_utc, chain.leaf.not_valid_after_utc
    verified = _verify(chain, authority, min(max(now, begin), end))
    return [PublicKey.of(certificate.public_key()) for certificate in verified]


def require_current(leaf: x509.Certificate, now: datetime) -> None:
    """Check the dates of a certificate; there is no tolerance.

    Raises:
        CertificateError: It is not valid yet.
        ExpiredError: It is not valid any more.
    """
    if now < leaf.not_valid_before_utc:
        raise CertificateError(
            f"is valid from {_day(leaf.not_valid_before_utc)} on, and this machine's clock says "
            f"{_day(now)}; set the clock"
        )
    if now > leaf.not_valid_after_utc:
        raise ExpiredError(
            f"expired on {_day(leaf.not_valid_after_utc)}, and this machine's clock says "
            f"{_day(now)}; what it signed counts no more"
        )


def with_certificate(key: SigningKey, environ: Mapping[str, str], *, local: bool) -> SigningKey:
    """The key with the certificate that the environment names; the key itself without one.

    Args:
        key: What signs.
        environ: The environment.
        local: The key was made by this machine for itself.

    Raises:
        RecipeError: The certificate cannot be read, is not this key's, or may not sign now.
    """
    named = environ.get(CERTIFICATE_PATH)
    if not named:
        return key
    if local:
        fault = f"needs the key that it belongs to: set {KEY_PATH} to its path, too"
        raise RecipeError([Fault(CERTIFICATE_PATH, fault)])
    path = Path(named)
    try:
        with disk_errors(f"read {path}"):
            chain = parse_chain(read_bounded(path.resolve(), MAX_CHAIN_BYTES))
        if chain.key != key.public:
            raise CertificateError(
                f"of {chain.identity} is for key {chain.key.keyid[:12]}, and {KEY_PATH} is key "
                f"{key.public.keyid[:12]}; give the two that belong together"
            )
        require_current(chain.leaf, datetime.now(UTC))
    except CertificateError as error:
        fault = f"{path}: the certificate {error}"
        raise RecipeError([Fault(CERTIFICATE_PATH, fault)]) from error
    except CorruptError as error:
        raise RecipeError([Fault(CERTIFICATE_PATH, f"no certificate ({error})")]) from None
    return replace(key, certificates=chain.key.certificates)


def require_may_still_sign(key: SigningKey) -> None:
    """Stop before something is signed with a certificate that ended during a long run.

    Raises:
        UntrustedError: It did.
    """
    if key.certificates:
        try:
            require_current(parse_chain(key.certificates).leaf, datetime.now(UTC))
        except CertificateError as error:
            raise UntrustedError(
                f"nothing is signed, since the certificate {error}; run the same command again "
                f"with a new one in {CERTIFICATE_PATH}"
            ) from error


def split_chain(pem: bytes) -> tuple[bytes, bytes]:
    """Leaf and intermediates, PEM each, of what `parse_chain` took; the second may be empty."""
    leaf, *rest = _certificates(pem)
    return _pem(leaf), b"".join(map(_pem, rest))


def pem_of(der: bytes) -> bytes:
    """A certificate in DER as PEM; does not look into it."""
    text = base64.encodebytes(der).replace(b"\n", b"")
    lines = (text[at : at + 64] for at in range(0, len(text), 64))
    return b"-----BEGIN CERTIFICATE-----\n%b\n-----END CERTIFICATE-----\n" % b"\n".join(lines)


def subject(certificate: x509.Certificate) -> str:
    """Whose a certificate is, for messages: one line, bounded."""
    return _line(certificate.subject.rfc4514_string())


def _certificates(data: bytes) -> list[x509.Certificate]:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    if len(data) > MAX_CHAIN_BYTES:
        raise CertificateError(f"has {len(data)} bytes with its chain, at most {MAX_CHAIN_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what an old authority made; it is judged below
            found = x509.load_pem_x509_certificates(data)
            for one in found:  # the library reads these only when it is asked
                _ = (one.subject, one.issuer, one.not_valid_before_utc, one.not_valid_after_utc)
    except (ValueError, TypeError, LookupError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise CertificateError(
            "cannot be read: wanted PEM, the signer's own certificate first"
        ) from None
    return found


def _leaf_key(leaf: x509.Certificate) -> PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = leaf.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError(f"of {subject(leaf)} has a key of an unknown kind") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        kind = getattr(getattr(key, "curve", None), "name", type(key).__name__)
        raise CertificateError(f"of {subject(leaf)} has a key of kind {kind}, wanted ECDSA P-256")
    return PublicKey.of(key)


def _require_signer(leaf: x509.Certificate) -> None:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    constraints = _extension(leaf, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise CertificateError(f"of {subject(leaf)} is an authority's (CA:TRUE), not a signer's")
    usage = _extension(leaf, x509.KeyUsage)
    if usage is None or not usage.digital_signature:
        raise CertificateError(f"of {subject(leaf)} lacks keyUsage digitalSignature")
    extended = _extension(leaf, x509.ExtendedKeyUsage)
    if extended is not None and ExtendedKeyUsageOID.CODE_SIGNING not in extended:
        raise CertificateError(f"of {subject(leaf)} has an extendedKeyUsage without codeSigning")


def _identity(leaf: x509.Certificate) -> str:
    """The one name of a leaf: two would leave open who signed."""
    from cryptography import x509

    prefixes = {
        x509.UniformResourceIdentifier: "URI",
        x509.RFC822Name: "email",
        x509.DNSName: "DNS",
    }
    names = _extension(leaf, x509.SubjectAlternativeName)
    if names is None:
        raise CertificateError(
            f"of {subject(leaf)} has no subjectAltName, and the common name does not count; wanted "
            "one URI, email or DNS name"
        )
    found = [f"{prefixes.get(type(name), type(name).__name__)}:{name.value}" for name in names]
    if len(found) != 1 or not found[0].startswith(("URI:", "email:", "DNS:")):
        told = _line(", ".join(found))
        raise CertificateError(f"names {told}; wanted exactly one URI, email or DNS name")
    if not found[0].isascii() or not found[0].isprintable():
        raise CertificateError(f"has a name with unprintable characters: {_line(found[0])}")
    return found[0]


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    from cryptography import x509

    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
    except (
        ValueError,
        TypeError,
        LookupError,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
    ) as error:
        raise CertificateError(f"has extensions that cannot be read: {_line(str(error))}") from None


def _verify(chain: Chain, authority: x509.Certificate, at: datetime) -> list[x509.Certificate]:
    """The certificates from the leaf to the authority, both included."""
    from cryptography import x509
    from cryptography.x509 import verification as v
    from cryptography.x509.oid import ExtendedKeyUsageOID

    def code_signing(
        _: v.Policy, __: x509.Certificate, usages: x509.ExtendedKeyUsage | None
    ) -> None:
        if usages is not None and ExtendedKeyUsageOID.CODE_SIGNING not in usages:
            raise ValueError("its extendedKeyUsage is without codeSigning")

    agnostic = v.Criticality.AGNOSTIC
    issuers = v.ExtensionPolicy.webpki_defaults_ca()
    leaves = v.ExtensionPolicy.webpki_defaults_ee()
    verifier = (
        v.PolicyBuilder()
        .store(v.Store([authority]))
        .time(at)
        .max_chain_depth(MAX_INTERMEDIATES)
        .extension_policies(
            ca_policy=issuers.may_be_present(x509.ExtendedKeyUsage, agnostic, code_signing),
            ee_policy=leaves.may_be_present(x509.ExtendedKeyUsage, agnostic, code_signing),
        )
        .build_client_verifier()
    )
    try:
        return verifier.verify(chain.leaf, list(chain.intermediates)).chain
    except (v.VerificationError, ValueError) as error:
        issuer = _line(chain.leaf.issuer.rfc4514_string())
        made = "is self-signed" if chain.leaf.issuer == chain.leaf.subject else f"is by {issuer}"
        raise CertificateError(
            f"{made}, comes with {len(chain.intermediates)} intermediate ones, and was not issued "
            f"through the policy's authority {subject(authority)}, valid from "
            f"{_day(authority.not_valid_before_utc)} to {_day(authority.not_valid_after_utc)} "
            f"({_line(str(error))})"
        ) from None


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _day(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _line(text: str) -> str:
    """Text from a stranger's certificate for a message."""
    return "".join(one if one.isprintable() else "?" for one in text)[:200]
