"""The trust policy: who may sign builds, verdicts and moves of channels, and what is revoked.

    schema: 1
    keys:
    - name: ci                     # for people
      public_key_file: ci.pub      # beside the policy; or public_key: with the PEM itself
      may_sign: [builds, verdicts, channels]
    identities:                    # whoever an authority certifies to be this one
    - name: release workflow
      certificate_authority_file: ca.pem     # beside the policy; or certificate_authority: the PEM
      identity: URI:https://ci.example/team/engines   # or email:… or DNS:…, exactly as certified
      may_sign: [builds]
    revoked_keys: []               # key ids, those of certified keys and of authorities too
    revoked_digests: []            # packages
    builder_ids: []                # if there are any, provenance by one of them is a must

What a policy names counts, and nothing else. A key has no dates: it counts until it is revoked. A
certificate counts while it is valid by this machine's clock, and what it signed counts no longer
than that, since nobody else says when a signature was made (docs/trust.md). Without a policy, what
this machine signs with is believed (`trust_for`).

`channels` covers moves of channels and yanks. A policy that gives it to no key, such as one from
before there was this right, lets every key with another right move channels: that cannot make a
reader believe a package or a verdict, which are signed by themselves. Give it to one key, and only
those that have it count. Identities are counted like keys here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass as plain_dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic.dataclasses import dataclass

from pipeline.core.errors import UntrustedError
from pipeline.core.settings import STRICT, Listed
from pipeline.registry.signing.certificate import (
    CertificateError,
    Chain,
    ExpiredError,
    parse_authority,
    parse_chain,
    require_current,
    require_issued,
)
from pipeline.registry.signing.envelope import Envelope
from pipeline.registry.signing.keys import PublicKey, parse_public_key

if TYPE_CHECKING:
    from cryptography import x509

Role = Literal["builds", "verdicts", "channels"]
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_IDENTITY = re.compile(r"(URI|email|DNS):[!-)+-~]+")
"""Printable ASCII without a space or `*`: names are compared whole, a pattern would match none."""
_AFTER_EXPIRY = (
    "; take a version that was signed since, build it again, or, if whoever held this key is still "
    "believed, name the key itself under keys in the policy"
)


class Signer(Protocol):
    """Who signed something and is believed.

    Attributes:
        name: For people, from the policy.
        key: What the signature verifies with.
        identity: The name in the certificate; None for a key that the policy names itself.
    """

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> PublicKey: ...
    @property
    def identity(self) -> str | None: ...


def told(signer: Signer) -> str:
    """Who it is, for people."""
    by = f"{signer.identity}, " if signer.identity else ""
    return f"{signer.name} ({by}key {signer.key.keyid[:12]})"


def signer_json(signer: Signer) -> dict[str, str]:
    """The same for programs; `identity` is there for certificates only."""
    value = {"name": signer.name, "keyid": signer.key.keyid}
    return {**value, "identity": signer.identity} if signer.identity else value


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrustedKey:
    """One signer.

    Attributes:
        name: For people.
        public_key: PEM.
        may_sign: `builds`: packages and their provenance. `verdicts`: test results. `channels`:
            moves of channels, and yanks.
    """

    name: str
    public_key: str
    may_sign: Listed[Role]

    def __post_init__(self) -> None:
        _ = self.key  # a policy with a broken key is refused as a whole

    @cached_property
    def key(self) -> PublicKey:
        """The parsed key."""
        return parse_public_key(self.public_key.encode(), f"key {self.name}")

    @property
    def identity(self) -> None:
        """None: the key itself is trusted."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrustedIdentity:
    """Whoever holds a certificate of one authority for exactly one name.

    Attributes:
        name: For people.
        certificate_authority: Its one certificate, PEM; it may be an intermediate authority's.
        identity: `URI:…`, `email:…` or `DNS:…`, the one subjectAltName of the certificate.
        may_sign: As in `TrustedKey`.
    """

    name: str
    certificate_authority: str
    identity: str
    may_sign: Listed[Role]

    def __post_init__(self) -> None:
        if not _IDENTITY.fullmatch(self.identity):
            raise ValueError(
                f"identity {self.identity!r} is not URI:…, email:… or DNS:… and one whole name; "
                "there are no patterns"
            )
        try:
            _ = self.authority
        except CertificateError as error:
            raise ValueError(f"certificate_authority: the certificate {error}") from error

    @cached_property
    def authority(self) -> x509.Certificate:
        """The parsed certificate."""
        return parse_authority(self.certificate_authority.encode())


@plain_dataclass(frozen=True, kw_only=True)
class CertifiedSigner:
    """A signer whom an authority of the policy certifies; see `Signer`."""

    name: str
    key: PublicKey
    identity: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrustPolicy:
    """Whom this machine believes.

    Attributes:
        schema: Of the file.
        keys: Signers by their keys.
        identities: Signers by their certificates.
        revoked_keys: Ids of keys whose signatures count no more, whenever they were made; with an
            authority's key, neither do the certificates that it signed.
        revoked_digests: Packages that may not be used, whoever signed them.
        builder_ids: SLSA builders that are believed; empty for any, and provenance may be missing.
    """

    schema: Literal[1] = 1
    keys: Listed[TrustedKey] = ()
    identities: Listed[TrustedIdentity] = ()
    revoked_keys: Listed[str] = ()
    revoked_digests: Listed[str] = ()
    builder_ids: Listed[str] = ()

    def __post_init__(self) -> None:
        for kind in ("revoked_keys", "revoked_digests"):
            for value in getattr(self, kind):
                # A revocation with a typing error would revoke nothing.
                if not _HEX_DIGEST.fullmatch(value.removeprefix("sha256:")):
                    raise ValueError(f"{kind}: {value!r} is not 64 lowercase hex digits")
        ids = [key.key.keyid for key in self.keys]
        if len(set(ids)) != len(ids):
            raise ValueError("keys: one key is there twice; give it both rights in one entry")
        held = [(one.authority, one.identity) for one in self.identities]
        if len(set(held)) != len(held):
            raise ValueError(
                "identities: one is there twice; give it both rights in one entry, or leave out "
                "the authority that no longer counts"
            )

    def require_not_revoked(self, digest: str) -> None:
        """Refuse a package that was revoked.

        Raises:
            UntrustedError: It was.
        """
        if digest in {value.removeprefix("sha256:") for value in self.revoked_digests}:
            raise UntrustedError(f"package {digest[:12]} is revoked; use another version")

    def signer(
        self, envelope: Envelope, role: Role, origin: str, *, expired_too: bool = False
    ) -> Signer:
        """Who signed an envelope, if this policy lets them.

        Args:
            envelope: Not believed yet.
            role: What it holds.
            origin: Where it comes from, for messages.
            expired_too: Believe a certificate that is not valid any more, for what only forbids.

        Raises:
            UntrustedError: Nobody who may; says of each signature why it does not count.
        """
        reasons = []
        for keyid in envelope.keyids:
            shown = envelope.certificates.get(keyid, b"")
            found, reason = self.judge(keyid, shown, role, expired_too=expired_too)
            if found is not None and envelope.verifies(found.key):
                return found
            reasons.append(reason or f"the signature by {keyid[:12]} does not match its content")
        why = "; ".join(reasons) or "it has no signature"
        raise UntrustedError(f"{origin}: {why}")

    def may(self, key: TrustedKey, role: Role) -> bool:
        """Whether a key of this policy may sign; not if it is revoked."""
        return self._judge(key.key.keyid, role)[0] is not None

    def require_may(self, key: PublicKey, role: Role) -> None:
        """Stop before something is signed that readers with this policy would refuse.

        Raises:
            UntrustedError: This key may not.
        """
        found, reason = self.judge(key.keyid, key.certificates, role)
        if found is None:
            raise UntrustedError(f"{reason}; sign with another key, or change the policy")

    def judge(
        self, keyid: str, certificates: bytes, role: Role, *, expired_too: bool = False
    ) -> tuple[Signer | None, str]:
        """Who may sign with a key now, or why nobody may.

        A key that the policy names is believed as it is, whatever certificate comes with it.

        Args:
            keyid: Of the key.
            certificates: What came with its signature, as in `PublicKey`; not believed.
            role: What is signed.
            expired_too: As in `signer`.
        """
        key, reason = self._judge(keyid, role)
        if key is not None or not certificates or keyid in self._revoked:
            return key, reason
        try:
            found = self._certified(keyid, parse_chain(certificates), role, expired_too)
        except CertificateError as error:
            named = any(one.key.keyid == keyid for one in self.keys)
            return None, f"{reason}; its certificate {error}" if named else (
                f"key {keyid[:12]} is not trusted here, since its certificate {error}"
            )
        return found, ""

    def _certified(
        self, keyid: str, chain: Chain, role: Role, expired_too: bool
    ) -> CertifiedSigner:
        """The identity that may sign.

        Raises:
            CertificateError: None may.
        """
        if chain.key.keyid != keyid:
            raise CertificateError(f"is for another key, {chain.key.keyid[:12]}")
        named = [one for one in self.identities if one.identity == chain.identity]
        if not named:
            wanted = ", ".join(one.identity for one in self.identities)
            raise CertificateError(
                f"names {chain.identity}, and the policy believes "
                f"{f'{wanted} only' if wanted else 'keys only, no identities'}"
            )
        faults = []
        for entry in named:
            try:
                return self._certified_by(entry, chain, role, expired_too)
            except CertificateError as error:
                faults.append(f"names {chain.identity} ({entry.name}), but {error}")
        raise CertificateError("; ".join(faults))

    def _certified_by(
        self, entry: TrustedIdentity, chain: Chain, role: Role, expired_too: bool
    ) -> CertifiedSigner:
        now = datetime.now(UTC)
        keys = require_issued(chain, entry.authority, now)
        if revoked := [key.keyid[:12] for key in keys if key.keyid in self._revoked]:
            raise CertificateError(f"comes through key {revoked[0]}, which is revoked")
        if role not in self._rights(entry):
            raise CertificateError(f"may not sign {role}, only {', '.join(entry.may_sign)}")
        try:
            require_current(chain.leaf, now)
        except ExpiredError as error:
            if not expired_too:
                raise CertificateError(f"{error}{_AFTER_EXPIRY}") from error
        return CertifiedSigner(name=entry.name, key=chain.key, identity=chain.identity)

    @property
    def _revoked(self) -> set[str]:
        return {value.removeprefix("sha256:") for value in self.revoked_keys}

    def _judge(self, keyid: str, role: Role) -> tuple[TrustedKey | None, str]:
        """The key that may sign, or why it may not."""
        key = next((key for key in self.keys if key.key.keyid == keyid), None)
        name = f"{keyid[:12]} ({key.name})" if key else keyid[:12]
        if keyid in self._revoked:
            return None, f"key {name} is revoked"
        if key is None:
            return (
                None,
                f"key {name} is not trusted here; if you know whose it is, name it in a policy",
            )
        if role not in self._rights(key):
            return None, f"key {name} may not sign {role}, only {', '.join(key.may_sign)}"
        return key, ""

    def _rights(self, entry: TrustedKey | TrustedIdentity) -> tuple[Role, ...]:
        """What a key or an identity may sign; see the module for `channels`."""
        everybody: tuple[TrustedKey | TrustedIdentity, ...] = (*self.keys, *self.identities)
        shared = entry.may_sign and not any("channels" in other.may_sign for other in everybody)
        return (*entry.may_sign, "channels") if shared else entry.may_sign


@plain_dataclass(frozen=True, kw_only=True)
class OwnKey:
    """What this machine signs with.

    Attributes:
        key: The public half.
        local: It was made by the first build here, not given.
    """

    key: PublicKey
    local: bool


def trust_for(policy: TrustPolicy | None, own: OwnKey | None, *, own_folder: bool) -> TrustPolicy:
    """Whom to believe; pure.

    A policy decides alone. Without one, a key that was given to this machine to sign with is
    believed, since whoever holds it could sign anything here anyway. A local key counts for this
    machine's own folder registry only, never for S3, OCI or another machine.

    Args:
        policy: From a file, or None.
        own: What this machine signs with, or None.
        own_folder: The package lies in a folder of this machine.
    """
    if policy is not None:
        return policy
    if own is None or (own.local and not own_folder):
        return TrustPolicy()
    name = "this machine's local key" if own.local else "this machine's signing key"
    pem = own.key.pem.decode()
    key = TrustedKey(name=name, public_key=pem, may_sign=("builds", "verdicts"))
    return TrustPolicy(keys=(key,))
