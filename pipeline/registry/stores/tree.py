"""Reading a registry in a tree of objects: what a folder and a bucket have in common.

`pipeline.registry.store` has the layout. Names in the tree are hints: what is no valid name is not
ours and is skipped; what counts is signed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from pipeline.core.errors import CorruptError, NotFoundError, RecipeError
from pipeline.core.published import FileDigest
from pipeline.registry.manifest import MANIFEST, MAX_MANIFEST_BYTES, path_fault
from pipeline.registry.reference import check_part
from pipeline.registry.store import (
    ENVELOPE,
    MAX_ATTACHMENT_BYTES,
    MAX_MOVES,
    MAX_SMALL_BYTES,
    Place,
    RawStatement,
    is_statement_name,
    limit_dated,
    limit_kinds,
    max_bytes,
    parse_identity,
    read_each,
    readers,
)

IDENTITY = "registry.json"
STATEMENTS = ".statements/"
LOG = re.compile(r"([^/]+)/([^/]+)/channels/log/([0-9a-f]{64})\.dsse\.json")
_REST = re.compile(r"(?P<version>[^/]*?)(?P<rest>\.lease|\.statements/.*|/.*)")


@dataclass(frozen=True, kw_only=True)
class Found:
    """An object, unread; written at `modified_s`, Unix time by the store's clock."""

    key: str
    size_bytes: int
    modified_s: float


class Objects(Protocol):
    """Objects by key, relative to the registry; several threads may use it at once."""

    @property
    def url(self) -> str:
        """Names the place in messages; no secrets."""

    def listed(self, prefix: str) -> Iterator[Found]:
        """All objects whose key starts so; `prefix` is empty or ends in `/`."""

    def read(self, key: str, limit_bytes: int) -> bytes | None:
        """A small object; None if there is none, CorruptError if it is longer."""

    def stream(
        self, key: str, offset: int, end: int | None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """The bytes of an object from `offset` on; see `Store.open_file`."""


def variant_key(name: str, variant: str) -> str:
    """The folder of a variant, without `/` at its end."""
    return f"{check_part('name', name)}/{check_part('variant', variant)}"


def prefix_of(name: str | None, variant: str | None) -> str:
    """What all keys start with, of a recipe, or of a variant of it."""
    prefix = "" if name is None else f"{check_part('name', name)}/"
    return prefix if variant is None else f"{prefix}{check_part('variant', variant)}/"


def version_key(place: Place) -> str:
    """The folder of a version, without `/` at its end."""
    return f"{variant_key(place.name, place.variant)}/{check_part('version', place.version)}"


def manifest_key(place: Place) -> str:
    """The object that makes a version visible."""
    return f"{version_key(place)}/{MANIFEST}"


def statements_key(place: Place) -> str:
    """The folder of the statements about a version, `/` at its end."""
    return f"{version_key(place)}{STATEMENTS}"


def moves_key(name: str, variant: str) -> str:
    """The folder of a variant's moves, `/` at its end."""
    return f"{variant_key(name, variant)}/channels/log/"


def parse_key(key: str) -> tuple[Place, str] | None:
    """The version that a key is of, and what follows the version; None if it is none of ours."""
    parts = key.split("/", 2)
    match = _REST.fullmatch(parts[2]) if len(parts) == 3 else None
    if match is None:
        return None
    try:
        place = Place(name=parts[0], variant=parts[1], version=match["version"])
        version_key(place)
    except RecipeError:
        return None
    return place, match["rest"]


@dataclass(frozen=True, kw_only=True)
class TreeStore:
    """`pipeline.registry.store.Store`, over any `Objects`."""

    objects: Objects
    public: bool = False
    local: bool = False

    @property
    def url(self) -> str:
        return self.objects.url

    def identity(self) -> str | None:
        data = self.objects.read(IDENTITY, MAX_SMALL_BYTES)
        return None if data is None else parse_identity(data, f"{self.url}: {IDENTITY}")

    def places(self, name: str | None = None, variant: str | None = None) -> list[Place]:
        parsed = (parse_key(found.key) for found in self.objects.listed(prefix_of(name, variant)))
        return sorted(one[0] for one in parsed if one and one[1] == f"/{MANIFEST}")

    def read_manifest(self, place: Place) -> bytes:
        data = self.objects.read(manifest_key(place), MAX_MANIFEST_BYTES)
        if data is None:
            raise NotFoundError(f"{self.url} has no {place}")
        return data

    def open_file(
        self, place: Place, file: FileDigest, offset: int = 0, end: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        if fault := path_fault(file.path):
            raise CorruptError(f"{place}: {file.path!r} {fault}")
        return self.objects.stream(f"{version_key(place)}/{file.path}", offset, end)

    def read_statements(
        self, place: Place, names: Collection[str] | None = None
    ) -> list[RawStatement]:
        prefix, what = statements_key(place), f"{self.url}: statements of {place}"
        if names is None:
            dated: list[tuple[float, str]] = []
            for found in self.objects.listed(prefix):
                name, _, file = found.key.removeprefix(prefix).partition("/")
                if file == ENVELOPE and is_statement_name(name):
                    dated.append((found.modified_s, name))
            names = limit_kinds(dated, what)

        def read(name: str) -> bytes | None:
            return self.objects.read(f"{prefix}{name}/{ENVELOPE}", max_bytes(name))

        held = read_each(read, names, what, readers(self))
        return [RawStatement(name=name, files={ENVELOPE: data}) for name, data in held.items()]

    def read_attachments(
        self, place: Place, name: str, files: Mapping[str, str]
    ) -> dict[str, bytes]:
        prefix = f"{statements_key(place)}{name}/"
        read = {file: self.objects.read(f"{prefix}{file}", MAX_ATTACHMENT_BYTES) for file in files}
        return {file: data for file, data in read.items() if data is not None}

    def read_moves(
        self, name: str, variant: str, names: Collection[str] | None = None
    ) -> list[bytes]:
        prefix, what = moves_key(name, variant), f"{self.url}: moves of {name}/{variant}"
        if names is None:
            dated = [
                (found.modified_s, match[3])
                for found in self.objects.listed(prefix)
                if (match := LOG.fullmatch(found.key))
            ]
            names = limit_dated(dated, MAX_MOVES, what)

        def read(digest: str) -> bytes | None:
            return self.objects.read(f"{prefix}{digest}.dsse.json", MAX_SMALL_BYTES)

        return list(read_each(read, names, what, readers(self)).values())
