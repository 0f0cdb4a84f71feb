"""A registry in a tree of objects: what a folder and a bucket have in common.

`pipeline.registry.store` has the layout. Names in the tree are hints: what is no valid name is not
ours and is skipped; what counts is signed.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.core.errors import CorruptError, NotFoundError
from pipeline.core.values import FileDigest, Package
from pipeline.registry.manifest import MANIFEST, MAX_MANIFEST_BYTES
from pipeline.registry.paths import path_fault
from pipeline.registry.reference import check_part
from pipeline.registry.store import (
    ENVELOPE,
    MAX_ATTACHMENT_BYTES,
    MAX_ENVELOPE_BYTES,
    MAX_MOVES,
    MAX_PER_KIND,
    NONE_KNOWN,
    OnBytes,
    Place,
    RawStatement,
    is_attachment_name,
    is_statement_name,
)
from pipeline.registry.stores import publication, removal
from pipeline.registry.stores.layout import (
    IDENTITY,
    STATEMENTS,
    listing_key,
    manifest_key,
    moves_key,
    new_identity,
    parse_identity,
    parse_key,
    statements_key,
    variant_key,
    version_key,
)
from pipeline.registry.stores.objects import (
    Objects,
    bounded,
    bounded_kinds,
    in_parallel,
    readable,
)

_MAX_ATTACHMENTS = 16
_MOVE = re.compile(r"([0-9a-f]{64})\.dsse\.json")


@dataclass(frozen=True, kw_only=True)
class TreeStore:
    """`pipeline.registry.store.WritableStore`, over any `Objects`."""

    objects: Objects
    public: bool = False
    local: bool = False

    @property
    def url(self) -> str:
        return self.objects.url

    def identity(self) -> str | None:
        data = self.objects.read(IDENTITY, MAX_ENVELOPE_BYTES)
        return None if data is None else parse_identity(data, f"{self.url}: {IDENTITY}")

    def create_identity(self) -> str:
        if (there := self.identity()) is not None:
            return there
        self.objects.create(IDENTITY, new_identity())
        made = self.identity()
        if made is None:
            raise NotFoundError(f"{self.url}: {IDENTITY} was removed while it was made; try again")
        return made

    def places(self, name: str | None = None, variant: str | None = None) -> list[Place]:
        return sorted(self.statement_names(name, variant))

    def statement_names(
        self, name: str | None = None, variant: str | None = None
    ) -> dict[Place, tuple[str, ...]]:
        published: set[Place] = set()
        names: dict[Place, list[str]] = {}
        for found in self.objects.listed(listing_key(name, variant)):
            if (parsed := parse_key(found.key)) is None:
                continue
            place, rest = parsed
            statement, _, file = rest.removeprefix(STATEMENTS).partition("/")
            if rest == f"/{MANIFEST}":
                published.add(place)
            elif rest.startswith(STATEMENTS) and file == ENVELOPE and is_statement_name(statement):
                names.setdefault(place, []).append(statement)
        return {place: tuple(names.get(place, ())) for place in published}

    def read_manifest(self, place: Place) -> bytes:
        data = self.objects.read(manifest_key(place), MAX_MANIFEST_BYTES)
        if data is None:
            raise NotFoundError(f"{self.url} has no {place}")
        return data

    def open_file(
        self, place: Place, file: FileDigest, offset: int = 0, end: int | None = None
    ) -> contextlib.AbstractContextManager[Iterator[bytes]]:
        if fault := path_fault(file.path):
            raise CorruptError(f"{place}: {file.path!r} {fault}")
        return self.objects.stream(f"{version_key(place)}/{file.path}", offset, end)

    def read_statements(
        self, place: Place, names: Collection[str] | None = None
    ) -> list[RawStatement]:
        known = names
        if known is None or len(known) > MAX_PER_KIND:  # else nothing need be listed
            known = self._envelopes(place, names)

        def read(name: str) -> RawStatement | None:
            data = self._read_small(f"{statements_key(place)}{name}/{ENVELOPE}")
            return None if data is None else RawStatement(name=name, files={ENVELOPE: data})

        found = in_parallel(read, filter(is_statement_name, known))
        return readable(found, f"{self.url}: statements of {place}")

    def read_statement(self, place: Place, name: str) -> RawStatement:
        if not is_statement_name(name):
            raise NotFoundError(f"{self.url}: {place} has no statement {name!r}")
        prefix = f"{statements_key(place)}{name}/"
        envelope = self.objects.read(f"{prefix}{ENVELOPE}", MAX_ENVELOPE_BYTES)
        if envelope is None:
            raise NotFoundError(f"{self.url}: {place} has no statement {name}")
        files = {ENVELOPE: envelope}
        for found in self.objects.listed(prefix):
            file = found.key.removeprefix(prefix)
            if not is_attachment_name(file):
                continue
            if len(files) > _MAX_ATTACHMENTS:
                raise CorruptError(f"{self.url}: statement {name} of {place} has too many files")
            data = self.objects.read(found.key, MAX_ATTACHMENT_BYTES)
            if data is not None:
                files[file] = data
        return RawStatement(name=name, files=files)

    def read_moves(
        self, name: str, variant: str, known: Mapping[str, bytes] = NONE_KNOWN
    ) -> list[bytes]:
        prefix, what = moves_key(name, variant), f"{self.url}: moves of {name}/{variant}"
        dated = sorted(
            (found.modified_s, match[1])
            for found in self.objects.listed(prefix)
            if (match := _MOVE.fullmatch(found.key.removeprefix(prefix)))
        )

        def read(digest: str) -> bytes | None:
            return known.get(digest) or self._read_small(f"{prefix}{digest}.dsse.json")

        kept = bounded([digest for _, digest in dated], MAX_MOVES, what)
        return readable(in_parallel(read, kept), what)

    def check_writable(self) -> None:
        self.objects.check_exclusive()

    def put_package(
        self,
        package: Package,
        statements: Sequence[RawStatement],
        on_bytes: OnBytes = lambda _: None,
    ) -> bool:
        self.create_identity()
        return publication.put_package(self.objects, package, statements, on_bytes)

    def put_statement(self, place: Place, statement: RawStatement) -> bool:
        if self.objects.find(manifest_key(place)) is None:
            raise NotFoundError(f"{self.url} has no {place}; publish it first")
        return publication.put_statement(self.objects, place, statement)

    def put_move(self, name: str, variant: str, data: bytes) -> bool:
        file = f"{hashlib.sha256(data).hexdigest()}.dsse.json"
        return self.objects.create(f"{moves_key(name, variant)}{file}", data)

    def put_hint(self, name: str, variant: str, channel: str, card: str, data: bytes) -> None:
        file = f"{check_part('channel', channel)}.{check_part('card', card)}.json"
        self.objects.replace(f"{variant_key(name, variant)}/channels/{file}", data)

    def delete_package(self, place: Place) -> int:
        return removal.delete_package(self.objects, place)

    def now_s(self) -> float:
        return self.objects.now_s()

    def leftovers(self, min_age_s: float, *, delete: bool) -> list[str]:
        return removal.leftovers(self.objects, min_age_s, delete=delete)

    def _envelopes(self, place: Place, names: Collection[str] | None) -> list[str]:
        """Names of statements about a version, as many as are read; the oldest first."""
        prefix = statements_key(place)
        dated: list[tuple[float, str]] = []
        for found in self.objects.listed(prefix):
            name, _, file = found.key.removeprefix(prefix).partition("/")
            if file == ENVELOPE and is_statement_name(name) and (names is None or name in names):
                dated.append((found.modified_s, name))
        kept = [name for _, name in sorted(dated)]
        return bounded_kinds(kept, f"{self.url}: statements of {place}")

    def _read_small(self, key: str) -> bytes | None:
        """A small object; None if it is not there, too long, or a link."""
        try:
            return self.objects.read(key, MAX_ENVELOPE_BYTES)
        except CorruptError:
            return None
