"""An authority that certifies whatever a test asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pipeline.registry.signing.keys import SigningKey, generate_key
from pipeline.registry.signing.trust import Role, TrustedIdentity, TrustPolicy

URI = "https://ci.example/team/engines"
IDENTITY = f"URI:{URI}"
CODE_SIGNING = ExtendedKeyUsageOID.CODE_SIGNING
MAIL = x509.RFC822Name("ci@example.org")
NAMES: tuple[x509.GeneralName, ...] = (x509.UniformResourceIdentifier(URI),)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@dataclass(frozen=True, kw_only=True)
class Authority:
    """A certificate and its key, and the certificates between it and the root.

    Attributes:
        key: Signs.
        certificate: Its own.
        above: Certificates up to the root, which is not among them.
    """

    key: Any
    certificate: x509.Certificate
    above: tuple[x509.Certificate, ...] = ()

    @property
    def pem(self) -> bytes:
        return pem(self.certificate)

    def issue(
        self,
        key: Any,
        *,
        names: Sequence[x509.GeneralName] = NAMES,
        common_name: str = "signer",
        days: tuple[float, float] = (-1, 30),
        usage: bool | None = True,
        extended: Sequence[x509.ObjectIdentifier] = (CODE_SIGNING,),
        ca: bool = False,
        path_length: int | None = None,
    ) -> x509.Certificate:
        """Certify a public key."""
        return _signed(
            key,
            by=self.key,
            issuer=self.certificate.subject,
            subject=_name(common_name),
            names=names,
            days=days,
            usage=usage,
            extended=extended,
            ca=ca,
            path_length=path_length,
        )

    def below(
        self,
        *,
        path_length: int | None = None,
        name: str = "between",
        days: tuple[float, float] = (-9, 200),
    ) -> Authority:
        """An intermediate authority."""
        key = ec.generate_private_key(ec.SECP384R1())
        made = self.issue(
            key.public_key(),
            names=(),
            common_name=name,
            ca=True,
            path_length=path_length,
            days=days,
        )
        return Authority(key=key, certificate=made, above=(made, *self.above))

    def signer(self, **more: Any) -> SigningKey:
        """A key with its certificate and the intermediate ones."""
        return self.certify(generate_key(), **more)

    def certify(self, key: SigningKey, **more: Any) -> SigningKey:
        """The same key with a certificate."""
        leaf = self.issue(key.private.public_key(), **more)
        return replace(key, certificates=b"".join(map(pem, (leaf, *self.above))))

    def trusted(
        self, *roles: Role, identity: str = IDENTITY, name: str = "workflow"
    ) -> TrustedIdentity:
        """The policy's entry."""
        return TrustedIdentity(
            name=name,
            certificate_authority=self.pem.decode(),
            identity=identity,
            may_sign=roles,
        )


def authority(
    *,
    name: str = "team CA",
    days: tuple[float, float] = (-10, 300),
    path_length: int | None = None,
) -> Authority:
    """A root."""
    key = ec.generate_private_key(ec.SECP384R1())
    made = _signed(
        key.public_key(),
        by=key,
        issuer=_name(name),
        subject=_name(name),
        days=days,
        ca=True,
        path_length=path_length,
    )
    return Authority(key=key, certificate=made)


def policy_of(ca: Authority, *roles: Role, **more: Any) -> TrustPolicy:
    """Whom the authority certifies may sign these, by default builds and verdicts."""
    return TrustPolicy(identities=(ca.trusted(*(roles or ("builds", "verdicts"))),), **more)


def self_signed(**more: Any) -> SigningKey:
    """A key that certifies itself."""
    key = generate_key()
    leaf = _signed(
        key.private.public_key(),
        by=key.private,
        issuer=_name("signer"),
        subject=_name("signer"),
        names=NAMES,
        **more,
    )
    return replace(key, certificates=pem(leaf))


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _signed(
    key: Any,
    *,
    by: Any,
    issuer: x509.Name,
    subject: x509.Name,
    names: Sequence[x509.GeneralName] = (),
    days: tuple[float, float] = (-1, 30),
    usage: bool | None = True,
    extended: Sequence[x509.ObjectIdentifier] = (),
    ca: bool = False,
    path_length: int | None = None,
) -> x509.Certificate:
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False
        )
    )
    if usage is not None:
        built = built.add_extension(
            x509.KeyUsage(
                digital_signature=usage and not ca,
                content_commitment=False,
                key_encipherment=not usage,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=ca,
                crl_sign=ca,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    if names:
        built = built.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if extended:
        built = built.add_extension(x509.ExtendedKeyUsage(extended), critical=False)
    return built.sign(by, SHA256())
