"""The trust policy: who may sign builds, verdicts and moves of channels, and what is revoked.

docs/trust.md has its form. What a policy names counts, and nothing else. A key counts until it is
revoked. Without a policy, a machine trusts the key that it signs with.

Keys are ECDSA on P-256, the one kind that DSSE and the OpenSSF model signature share.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import pydantic.dataclasses
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)
from pydantic import BeforeValidator, Field

from pipeline.core.errors import CorruptError, Fault, RecipeError, UntrustedError
from pipeline.core.ownership import require_unshared
from pipeline.core.settings import STRICT, Listed
from pipeline.registry.disk import disk_errors, read_bounded

if TYPE_CHECKING:
    import yaml

_MAX_KEY_BYTES = 16 << 10  # a P-256 key in PEM has some 240
KEYGEN = "make one with enginesmith keygen"


@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """The half that verifies: SubjectPublicKeyInfo in PEM, and the SHA-256 (hex) of it in DER."""

    pem: bytes
    keyid: str

    @classmethod
    def of(cls, key: ec.EllipticCurvePublicKey) -> PublicKey:
        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return cls(pem=pem, keyid=hashlib.sha256(der).hexdigest())


def parse_public_key(data: bytes, origin: str) -> PublicKey:
    """Read a public key in PEM; a RecipeError if it is no ECDSA P-256 key."""
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise key_fault(origin, "is not a public key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise key_fault(origin, "is not an ECDSA P-256 key")
    return PublicKey.of(key)


def read_public_key(path: Path) -> PublicKey:
    """Read the file of a public key; RecipeError if it is none, else like `read_key_file`."""
    return parse_public_key(read_key_file(path), str(path))


def read_key_file(path: Path) -> bytes:
    """A key's bytes; RecipeError if it is missing, AccessError if another user may replace it."""
    with disk_errors(f"read {path}"):
        require_unshared(path, "another path")
        try:
            return read_bounded(Path(os.path.realpath(path)), _MAX_KEY_BYTES)
        except CorruptError as error:
            raise key_fault(str(path), f"no such key ({error}); {KEYGEN}") from None


def config_root(environ: Mapping[str, str]) -> Path:
    """`$ENGINESMITH_CONFIG`, else `enginesmith` in `$XDG_CONFIG_HOME` or in `~/.config`."""
    if configured := environ.get("ENGINESMITH_CONFIG"):
        return Path(configured)
    base = environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "enginesmith"


def key_fault(origin: str, fault: str) -> RecipeError:
    """A fault of a key, or of what names one."""
    return RecipeError([Fault(origin, fault)])


POLICY_PATH = "ENGINESMITH_POLICY"
"""Environment variable: path of the trust policy."""
Role = Literal["builds", "verdicts", "channels"]
ROLES: tuple[Role, ...] = get_args(Role)
_MAX_POLICY_BYTES = 1 << 20
_Digest = Annotated[
    str,
    BeforeValidator(lambda text: text.removeprefix("sha256:") if isinstance(text, str) else text),
    Field(pattern="^[0-9a-f]{64}$"),  # a revocation with a typing error would revoke nothing
]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class TrustedKey:
    """One signer.

    `builds` are packages and their provenance, `verdicts` test results, `channels` moves and yanks.
    """

    name: str
    public_key: str
    may_sign: Listed[Role]

    def __post_init__(self) -> None:
        _ = self.key  # a policy with a broken key is refused as a whole

    @cached_property
    def key(self) -> PublicKey:
        return parse_public_key(self.public_key.encode(), f"key {self.name}")

    def __str__(self) -> str:
        return f"{self.name} (key {self.key.keyid[:12]})"

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "keyid": self.key.keyid}


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class TrustPolicy:
    """Whose signatures count on this machine; the fields are those of the file."""

    schema: Literal[1] = 1
    keys: Listed[TrustedKey] = ()
    revoked_keys: Listed[_Digest] = ()
    revoked_digests: Listed[_Digest] = ()
    builder_ids: Listed[str] = ()

    def __post_init__(self) -> None:
        ids = [key.key.keyid for key in self.keys]
        if len(set(ids)) != len(ids):
            raise ValueError("keys: one key is listed twice; give it all its rights in one entry")

    def find(self, keyid: str, role: Role) -> tuple[TrustedKey | None, str]:
        """The key of this id if it may sign, else None and why it may not."""
        key = next((key for key in self.keys if key.key.keyid == keyid), None)
        name = f"{keyid[:12]} ({key.name})" if key else keyid[:12]
        if keyid in self.revoked_keys:
            return None, f"key {name} is revoked"
        if key is None:
            advice = "if you know its owner, add it to the policy"
            return None, f"key {name} is not trusted here; {advice}"
        if role not in key.may_sign:
            return None, f"key {name} may not sign {role}, only {', '.join(key.may_sign)}"
        return key, ""

    def require_may(self, key: PublicKey, role: Role) -> None:
        """Refuse, as untrusted, to sign what readers with this policy would refuse."""
        found, reason = self.find(key.keyid, role)
        if found is None:
            raise UntrustedError(f"{reason}; sign with another key, or change the policy")


def own_trust(key: PublicKey) -> TrustPolicy:
    """What a machine without a policy trusts: the key that it signs with, in everything."""
    pem = key.pem.decode()
    own = TrustedKey(name="this machine's own key", public_key=pem, may_sign=ROLES)
    return TrustPolicy(keys=(own,))


def machine_policy(environ: Mapping[str, str], path: Path | None = None) -> TrustPolicy | None:
    """The trust policy of a machine; None if it has none. Raises like `load_policy`.

    The command line's (`path`) comes first, then the environment's, then `policy.yaml` in the
    configuration folder.
    """
    if path is None and (named := environ.get(POLICY_PATH)):
        path = Path(named)
    usual = config_root(environ) / "policy.yaml"
    if path is None and not os.path.lexists(usual):
        return None
    return load_policy(path or usual)


def load_policy(path: Path) -> TrustPolicy:
    """Read a policy in YAML or JSON.

    RecipeError names every fault; AccessError if another user may replace it.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    try:
        with disk_errors(f"read {path}"):
            require_unshared(path, "another path")
            data = read_bounded(Path(os.path.realpath(path)), _MAX_POLICY_BYTES)
        value = yaml.load(data, _unique_keys_loader())
        if not isinstance(value, dict) or "schema" not in value:
            raise ValueError("wanted a mapping with schema: 1")
        # As JSON: there pydantic makes objects of mappings although it is strict.
        return TypeAdapter(TrustPolicy).validate_json(json.dumps(value, default=str))
    except ValidationError as error:
        raise RecipeError(
            [
                Fault(f"{path}: {'.'.join(map(str, fault['loc']))}".rstrip(": "), fault["msg"])
                for fault in error.errors(include_url=False, include_input=False)
            ]
        ) from error
    except (CorruptError, yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        # A YAML alias may make a mapping that holds itself, which JSON refuses.
        raise RecipeError([Fault(str(path), f"is not a policy: {error}")]) from error


def _unique_keys_loader() -> type[yaml.SafeLoader]:
    """YAML whose mappings have no key twice: the second `revoked_keys` would hide the first."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.YAMLError(f"key {key!r} is there twice")
            return super().construct_mapping(node, deep)

    return Loader
