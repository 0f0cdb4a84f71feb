"""Read a trust policy from its file; `trust.py` shows what one looks like."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from pipeline.core.errors import CorruptError, Fault, RecipeError
from pipeline.registry.disk import disk_errors, read_bounded
from pipeline.registry.signing.certificate import MAX_CHAIN_BYTES
from pipeline.registry.signing.keys import read_public_key
from pipeline.registry.signing.trust import TrustPolicy

_MAX_POLICY_BYTES = 1 << 20


def load_policy(path: Path) -> TrustPolicy:
    """Read a policy in YAML or JSON.

    Raises:
        RecipeError: It is missing, or not a policy; names every fault.
    """
    try:
        with disk_errors(f"read {path}"):
            value = yaml.load(read_bounded(path.resolve(), _MAX_POLICY_BYTES), _UniqueKeys)
    except (CorruptError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError([Fault(str(path), f"is not a policy: {error}")]) from error
    if not isinstance(value, dict) or "schema" not in value:
        raise RecipeError([Fault(str(path), "is not a policy: wanted a mapping with schema: 1")])
    for section, inline in (("keys", _with_key), ("identities", _with_authority)):
        if isinstance(entries := value.get(section), list):
            value = {**value, section: [inline(entry, path.parent) for entry in entries]}
    try:
        # As JSON: there pydantic makes objects of mappings although it is strict.
        return TypeAdapter(TrustPolicy).validate_json(json.dumps(value, default=str))
    except ValidationError as error:
        raise RecipeError(
            [
                Fault(f"{path}: {'.'.join(map(str, fault['loc']))}".rstrip(": "), fault["msg"])
                for fault in error.errors(include_url=False, include_input=False)
            ]
        ) from error


def _with_key(entry: Any, folder: Path) -> Any:
    """An entry with the content of its `public_key_file`."""
    return _inlined(entry, "public_key", lambda path: read_public_key(folder / path).pem.decode())


def _with_authority(entry: Any, folder: Path) -> Any:
    """An entry with the content of its `certificate_authority_file`."""

    def read(name: str) -> str:
        path = folder / name
        try:
            with disk_errors(f"read {path}"):
                return read_bounded(path.resolve(), MAX_CHAIN_BYTES).decode("ascii", "replace")
        except CorruptError as error:
            raise RecipeError([Fault(str(path), f"no certificate ({error})")]) from None

    return _inlined(entry, "certificate_authority", read)


def _inlined(entry: Any, name: str, read: Callable[[str], str]) -> Any:
    file = f"{name}_file"
    if not isinstance(entry, Mapping) or not isinstance(entry.get(file), str):
        return entry
    rest = {key: value for key, value in entry.items() if key != file}
    if name in rest:
        return entry  # both: an unknown field, as the message will say
    return {**rest, name: read(entry[file])}


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings have no key twice: the second `revoked_keys` would hide the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} is there twice")
        return super().construct_mapping(node, deep)
