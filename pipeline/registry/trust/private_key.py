"""Keys that sign: from a file or from the environment, never in a manifest, a log or a message."""

from __future__ import annotations

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
    load_pem_private_key,
)

from pipeline.core.errors import AccessError
from pipeline.registry.trust.policy import KEYGEN, PublicKey, config_root, key_fault, read_key_file

KEY_PATH = "ENGINESMITH_SIGNING_KEY"
"""Environment variable: path of a private key."""
KEY_TEXT = "ENGINESMITH_SIGNING_KEY_PEM"
"""Environment variable: the private key itself, for systems that hand out secrets like this."""


@dataclass(frozen=True, kw_only=True)
class SigningKey:
    """A key pair; its repr shows the public half only."""

    private: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def public(self) -> PublicKey:
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


def read_private_key(path: Path) -> SigningKey:
    """Read the file of a private key; Kubernetes mounts some with mode 0644, which is fine.

    RecipeError if it is missing or no usable key, AccessError if another user may replace it.
    """
    return parse_private_key(read_key_file(path), str(path))


def local_key(environ: Mapping[str, str]) -> Path | None:
    """Where this machine's own key lies; None where `CI` is set, as it would vanish there."""
    in_ci = environ.get("CI", "").lower() not in {"", "0", "false"}
    return None if in_ci else config_root(environ) / "local.key"


def signing_key(environ: Mapping[str, str], *, local: bool) -> SigningKey | None:
    """The key that this machine signs with: the environment's, else its own, where `local` counts.

    RecipeError if the environment names two keys or one that cannot be used, AccessError if another
    user may read the local key, or replace any key.
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
