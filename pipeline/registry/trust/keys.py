"""Signing keys: ECDSA on P-256, the one kind that DSSE and the OpenSSF model signature share.

A key comes from a file or from the environment, and its private half never goes into a manifest, a
log or a message. Its id is the SHA-256 of the public key in DER (SubjectPublicKeyInfo), which
`openssl pkey -pubin -in KEY.pub -outform DER | sha256sum` prints too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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

from pipeline.core.errors import AccessError, ConflictError, CorruptError, Fault, RecipeError
from pipeline.registry.disk import disk_errors, read_bounded
from pipeline.registry.ownership import require_unshared

KEY_PATH = "ENGINESMITH_SIGNING_KEY"
"""Environment variable: path of a private key."""
KEY_TEXT = "ENGINESMITH_SIGNING_KEY_PEM"
"""Environment variable: the private key itself, for systems that hand out secrets like this."""
_MAX_KEY_BYTES = 16 << 10  # a P-256 key in PEM has some 240


@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """The half that verifies.

    Attributes:
        pem: SubjectPublicKeyInfo in PEM.
        keyid: SHA-256 (64 hex digits) of the same in DER.
    """

    pem: bytes
    keyid: str

    @classmethod
    def of(cls, key: ec.EllipticCurvePublicKey) -> PublicKey:
        """From the library's object."""
        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        keyid = hashlib.sha256(der).hexdigest()
        return cls(pem=pem, keyid=keyid)


@dataclass(frozen=True, kw_only=True)
class SigningKey:
    """A key pair; its repr shows the public half only.

    Attributes:
        private: The half that signs.
    """

    private: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def public(self) -> PublicKey:
        """The half that verifies."""
        return PublicKey.of(self.private.public_key())

    def private_pem(self) -> bytes:
        """PKCS 8 in PEM, not encrypted: for a file of mode 0600, and for nothing else."""
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def generate_key() -> SigningKey:
    """A new key pair."""
    return SigningKey(private=ec.generate_private_key(ec.SECP256R1()))


def parse_private_key(data: bytes, origin: str) -> SigningKey:
    """Read a private key in PEM.

    Args:
        data: The PEM.
        origin: Where it comes from, for messages; the data itself is never shown.

    Raises:
        RecipeError: It is no ECDSA P-256 key, or is encrypted.
    """
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError:
        raise _key_fault(origin, "is encrypted; give one without a password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise _key_fault(
            origin, "is not a private key in PEM; make one with enginesmith keygen"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise _key_fault(origin, "is not an ECDSA P-256 key; make one with enginesmith keygen")
    return SigningKey(private=key)


def parse_public_key(data: bytes, origin: str) -> PublicKey:
    """Read a public key in PEM.

    Raises:
        RecipeError: It is no ECDSA P-256 key.
    """
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise _key_fault(origin, "is not a public key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise _key_fault(origin, "is not an ECDSA P-256 key")
    return PublicKey.of(key)


def _key_fault(origin: str, fault: str) -> RecipeError:
    return RecipeError([Fault(origin, fault)])


def public_path(private: Path) -> Path:
    """Where the public half lies: beside the private one."""
    return private.with_name(f"{private.name}.pub")


def write_key_pair(key: SigningKey, path: Path) -> Path:
    """Write a private key, mode 0600, and its public half beside it; replaces nothing.

    Returns:
        The public half's path.

    Raises:
        ConflictError: One of the two files exists.
        AccessError: Not writable.
    """
    public = public_path(path)
    for taken in (path, public):
        if os.path.lexists(taken):
            raise ConflictError(f"{taken} exists; it stays as it is, so choose another with --out")
    with disk_errors(f"write {path}"):
        folder = path.absolute().parent
        for missing in reversed([one for one in (folder, *folder.parents) if not one.is_dir()]):
            missing.mkdir(0o700, exist_ok=True)
        # The public half last: what is half done has the half that can be made again from.
        _write_exclusive(path, key.private_pem(), 0o600)
        _write_exclusive(public, key.public.pem, 0o644)
    return public


def _write_exclusive(path: Path, data: bytes, mode: int) -> None:
    """Write a whole file, durable, under a name that was free; `link` decides who comes first."""
    with tempfile.NamedTemporaryFile(prefix=".key-", dir=path.absolute().parent) as stream:
        os.fchmod(stream.fileno(), mode)
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
        try:
            os.link(stream.name, path)
        except FileExistsError:
            raise ConflictError(f"{path} exists; it stays as it is, so choose another") from None


def config_root(environ: Mapping[str, str]) -> Path:
    """`$ENGINESMITH_CONFIG`, else `enginesmith` in `$XDG_CONFIG_HOME` or in `~/.config`.

    Not the cache: a cache may be deleted, or shared with other machines.
    """
    if configured := environ.get("ENGINESMITH_CONFIG"):
        return Path(configured)
    base = environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "enginesmith"


def local_key_path(environ: Mapping[str, str]) -> Path:
    """This machine's own key, for its own folder registry."""
    return config_root(environ) / "local.key"


@dataclass(frozen=True, kw_only=True)
class KeyChoice:
    """Which key signs.

    Attributes:
        kind: `file` and `environment` are explicit. `local` is made by the first build, and counts
            for this machine's own folder registry only.
        path: The file; None for a key in the environment.
    """

    kind: Literal["file", "environment", "local"]
    path: Path | None = None


def choose_key(environ: Mapping[str, str], path: Path | None = None) -> KeyChoice:
    """Decide which key signs; pure: reads no file.

    An explicit path comes first, then the environment, then the local key. Where `CI` is set, a
    local key would vanish with the machine and nobody could verify what it signed; so there a key
    must be given.

    Args:
        environ: The environment.
        path: From the command line.

    Raises:
        RecipeError: The environment names two keys, or names none in CI.
    """
    if path is not None:
        return KeyChoice(kind="file", path=path)
    from_path, text = environ.get(KEY_PATH), environ.get(KEY_TEXT)
    if from_path and text:
        raise RecipeError([Fault(KEY_PATH, f"{KEY_TEXT} is set too; set one of them")])
    if from_path:
        return KeyChoice(kind="file", path=Path(from_path))
    if text:
        return KeyChoice(kind="environment")
    if environ.get("CI", "").lower() not in {"", "0", "false"}:
        fault = (
            f"CI is set, and no key is given to sign with; set it to the path of a private key, or "
            f"{KEY_TEXT} to the key itself (make one with enginesmith keygen)"
        )
        raise RecipeError([Fault(KEY_PATH, fault)])
    return KeyChoice(kind="local", path=local_key_path(environ))


def load_key(choice: KeyChoice, environ: Mapping[str, str], *, make: bool = True) -> SigningKey:
    """Read the chosen key; a local key is made when there is none.

    Args:
        choice: From `choose_key`.
        environ: The same environment.
        make: Make a missing local key.

    Raises:
        RecipeError: It is missing, or no usable key.
        AccessError: Another user may read this machine's local key, or replace any key.
    """
    if choice.path is None:
        return parse_private_key(environ[KEY_TEXT].encode(), KEY_TEXT)
    local = choice.kind == "local"
    if local and make and not os.path.lexists(choice.path):
        with contextlib.suppress(ConflictError):  # another build made it meanwhile
            write_key_pair(generate_key(), choice.path)
    data = _read_key(choice.path, "make one with enginesmith keygen")
    # Kubernetes mounts secrets with mode 0644: a key that was given may be so.
    if local and stat.S_IMODE(choice.path.stat().st_mode) & 0o077:
        raise AccessError(
            f"{choice.path} can be read by others; run chmod 600 {choice.path}, or remove it"
        )
    return parse_private_key(data, str(choice.path))


def read_public_key(path: Path) -> PublicKey:
    """Read the file of a public key.

    Raises:
        RecipeError: It is missing, or no usable key.
        AccessError: Another user may replace it.
    """
    return parse_public_key(_read_key(path, "enginesmith keygen makes one"), str(path))


def _read_key(path: Path, advice: str) -> bytes:
    with disk_errors(f"read {path}"):
        try:
            data = read_bounded(path.resolve(), _MAX_KEY_BYTES)
        except CorruptError as error:
            raise _key_fault(str(path), f"no such key ({error}); {advice}") from None
        require_unshared(path)
    return data
