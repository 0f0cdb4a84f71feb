"""Keys of the tree that a folder and a bucket hold; `pipeline.registry.store` draws it."""

from __future__ import annotations

import json
import re
import secrets

from pipeline.core.errors import CorruptError, RecipeError
from pipeline.registry.manifest import MANIFEST
from pipeline.registry.reference import check_part
from pipeline.registry.store import Place

IDENTITY = "registry.json"
STATEMENTS = ".statements/"
LEASE = ".lease"
_REST = re.compile(r"(?P<version>[^/]*?)(?P<rest>\.lease|\.statements/.*|/.*)")
_IDENTITY = re.compile(r"[0-9a-f]{32}")


def variant_key(name: str, variant: str) -> str:
    """The folder of a variant, without `/` at its end.

    Raises:
        RecipeError: Not a name, or not a variant.
    """
    return f"{check_part('name', name)}/{check_part('variant', variant)}"


def version_key(place: Place) -> str:
    """The folder of a version, without `/` at its end."""
    return f"{variant_key(place.name, place.variant)}/{check_part('version', place.version)}"


def manifest_key(place: Place) -> str:
    """The object that makes a version visible."""
    return f"{version_key(place)}/{MANIFEST}"


def lease_key(place: Place) -> str:
    """The object that says that a version is being published, or was removed a moment ago."""
    return f"{version_key(place)}{LEASE}"


def statements_key(place: Place) -> str:
    """The folder of the statements about a version, `/` at its end."""
    return f"{version_key(place)}{STATEMENTS}"


def moves_key(name: str, variant: str) -> str:
    """The folder of a variant's moves, `/` at its end."""
    return f"{variant_key(name, variant)}/channels/log/"


def listing_key(name: str | None, variant: str | None) -> str:
    """What the keys of all recipes, one recipe, or one variant start with."""
    if name is None:
        return ""
    if variant is None:
        return f"{check_part('name', name)}/"
    return f"{variant_key(name, variant)}/"


def parse_key(key: str) -> tuple[Place, str] | None:
    """The version that a key is of, and what follows the version; None if it is none of ours."""
    parts = key.split("/", 2)
    match = _REST.fullmatch(parts[2]) if len(parts) == 3 else None
    if match is None:
        return None
    try:
        place = Place(
            name=check_part("name", parts[0]),
            variant=check_part("variant", parts[1]),
            version=check_part("version", match["version"]),
        )
    except RecipeError:
        return None
    return place, match["rest"]


def new_identity() -> bytes:
    """A new identity of a registry, as `registry.json`."""
    return json.dumps({"schema": 1, "id": secrets.token_hex(16)}).encode() + b"\n"


def parse_identity(data: bytes, origin: str) -> str:
    """The identity that a `registry.json` states.

    Raises:
        CorruptError: It states none.
    """
    try:
        value = json.loads(data)
        identity = value["id"]
        if value["schema"] == 1 and _IDENTITY.fullmatch(identity):
            return str(identity)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CorruptError(
        f"{origin} is not the identity of a registry, which moves and yanks name; restore it from "
        "a backup, or make a new registry and copy the packages there"
    )
