"""The trust policy: who may sign builds, verdicts and moves of channels, and what is revoked.

    schema: 1
    keys:
    - name: ci                     # for people
      public_key: |
        -----BEGIN PUBLIC KEY-----
        ...
      may_sign: [builds, verdicts, channels]
    revoked_keys: []               # key ids
    revoked_digests: []            # packages
    builder_ids: []                # if there are any, provenance by one of them is required

What a policy names counts, and nothing else. A key counts until it is revoked. Without a policy,
a machine trusts the key that it signs with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from pipeline.core.errors import CorruptError, Fault, RecipeError, UntrustedError
from pipeline.core.settings import STRICT, Listed
from pipeline.registry.disk import disk_errors, read_bounded, require_unshared
from pipeline.registry.trust.keys import PublicKey, config_root, parse_public_key, signing_key

if TYPE_CHECKING:
    import yaml

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


@dataclass(frozen=True, kw_only=True, config=STRICT)
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
        """The parsed key."""
        return parse_public_key(self.public_key.encode(), f"key {self.name}")

    def __str__(self) -> str:
        return f"{self.name} (key {self.key.keyid[:12]})"

    def to_json(self) -> dict[str, str]:
        """For programs."""
        return {"name": self.name, "keyid": self.key.keyid}


@dataclass(frozen=True, kw_only=True, config=STRICT)
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


def machine_trust(
    environ: Mapping[str, str], *, own_folder: bool, policy: Path | None = None
) -> TrustPolicy:
    """Whom this machine trusts; makes no key.

    A policy decides alone. Without one, a key that was given to this machine to sign with is
    trusted, since who holds it could sign anything here anyway. A local key counts for this
    machine's own folder registry only, never for S3, OCI or another machine.
    """
    if (loaded := machine_policy(environ, policy)) is not None:
        return loaded
    key = signing_key(environ, local=own_folder)
    return own_trust(key.public) if key else TrustPolicy()


def load_policy(path: Path) -> TrustPolicy:
    """Read a policy in YAML or JSON.

    Raises:
        RecipeError: It is missing, or not a policy; names every fault.
        AccessError: Another user may replace it.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    try:
        with disk_errors(f"read {path}"):
            data = read_bounded(path.resolve(), _MAX_POLICY_BYTES)
            require_unshared(path)
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


def policy_text(names: Mapping[str, PublicKey]) -> str:
    """A policy file that gives every right to each of these keys."""
    import yaml

    keys = [
        {"name": name, "public_key": key.pem.decode(), "may_sign": list(ROLES)}
        for name, key in names.items()
    ]
    value = {"schema": 1, "keys": keys, "revoked_keys": [], "revoked_digests": []}
    return yaml.safe_dump(value, sort_keys=False)


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
