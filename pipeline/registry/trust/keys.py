"""Signing keys: ECDSA on P-256, the one kind that DSSE and the OpenSSF model signature share.

A key comes from a file or from the environment, and its private half never goes into a manifest, a
log or a message. Its id is the SHA-256 of the public key in DER (SubjectPublicKeyInfo), which
`openssl pkey -pubin -in KEY.pub -outform DER | sha256sum` prints too.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from pipeline.core.errors import AccessError, CorruptError, Fault, RecipeError
from pipeline.registry.disk import disk_errors, read_bounded, require_unshared

KEY_PATH = "ENGINESMITH_SIGNING_KEY"
"""Environment variable: path of a private key."""
KEY_TEXT = "ENGINESMITH_SIGNING_KEY_PEM"
"""Environment variable: the private key itself, for systems that hand out secrets like this."""
_MAX_KEY_BYTES = 16 << 10  # a P-256 key in PEM has some 240
KEYGEN = "make one with enginesmith keygen"


@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """The half that verifies: SubjectPublicKeyInfo in PEM, and the SHA-256 (hex) of it in DER."""

    pem: bytes
    keyid: str

    @classmethod
    def of(cls, key: ec.EllipticCurvePublicKey) -> PublicKey:
        """From the library's object."""
        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return cls(pem=pem, keyid=hashlib.sha256(der).hexdigest())


@dataclass(frozen=True, kw_only=True)
class SigningKey:
    """A key pair; its repr shows the public half only."""

    private: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def public(self) -> PublicKey:
        """The half that verifies."""
        return PublicKey.of(self.private.public_key())

    def private_pem(self) -> bytes:
        """PKCS 8 in PEM, not encrypted: for a file of mode 0600, and for nothing else."""
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def parse_private_key(data: bytes, origin: str) -> SigningKey:
    """Read a private key in PEM, else a RecipeError that shows `origin`, never the data."""
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError:
        raise key_fault(origin, "is encrypted; give one without a password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise key_fault(origin, f"is not a private key in PEM; {KEYGEN}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise key_fault(origin, f"is not an ECDSA P-256 key; {KEYGEN}")
    return SigningKey(private=key)


def parse_public_key(data: bytes, origin: str) -> PublicKey:
    """Read a public key in PEM; a RecipeError if it is no ECDSA P-256 key."""
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise key_fault(origin, "is not a public key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise key_fault(origin, "is not an ECDSA P-256 key")
    return PublicKey.of(key)


def read_private_key(path: Path) -> SigningKey:
    """Read the file of a private key; Kubernetes mounts some with mode 0644, which is fine.

    Raises:
        RecipeError: It is missing, or no usable key.
        AccessError: Another user may replace it.
    """
    return parse_private_key(_read_key(path), str(path))


def read_public_key(path: Path) -> PublicKey:
    """Read the file of a public key; raises like `read_private_key`."""
    return parse_public_key(_read_key(path), str(path))


def _read_key(path: Path) -> bytes:
    with disk_errors(f"read {path}"):
        try:
            data = read_bounded(path.resolve(), _MAX_KEY_BYTES)
        except CorruptError as error:
            raise key_fault(str(path), f"no such key ({error}); {KEYGEN}") from None
        require_unshared(path)
    return data


def config_root(environ: Mapping[str, str]) -> Path:
    """`$ENGINESMITH_CONFIG`, else `enginesmith` in `$XDG_CONFIG_HOME` or in `~/.config`."""
    if configured := environ.get("ENGINESMITH_CONFIG"):
        return Path(configured)
    base = environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "enginesmith"


def local_key(environ: Mapping[str, str]) -> Path | None:
    """Where this machine's own key lies; None where `CI` is set, as it would vanish there."""
    in_ci = environ.get("CI", "").lower() not in {"", "0", "false"}
    return None if in_ci else config_root(environ) / "local.key"


def signing_key(environ: Mapping[str, str], *, local: bool) -> SigningKey | None:
    """The key that this machine signs with: the environment's, else its own, where `local` counts.

    Raises:
        RecipeError: The environment names two keys, or one that cannot be used.
        AccessError: Another user may read the local key, or replace any key.
    """
    path, text = environ.get(KEY_PATH), environ.get(KEY_TEXT)
    if path and text:
        raise key_fault(KEY_PATH, f"{KEY_TEXT} is set too; set one of them")
    if text:
        return parse_private_key(text.encode(), KEY_TEXT)
    if path:
        return read_private_key(Path(path))
    own = local_key(environ) if local else None
    if own is None or not os.path.lexists(own):
        return None
    key = read_private_key(own)
    if stat.S_IMODE(own.stat().st_mode) & 0o077:
        raise AccessError(f"{own} can be read by others; run chmod 600 {own}, or remove it")
    return key


def key_fault(origin: str, fault: str) -> RecipeError:
    """A fault of a key, or of what names one."""
    return RecipeError([Fault(origin, fault)])
