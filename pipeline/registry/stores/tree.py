"""A registry in a tree of objects: what a folder and a bucket have in common.

`pipeline.registry.store` has the layout. Names in the tree are hints: what is no valid name is not
ours and is skipped; what counts is signed. A package becomes visible in this order:

    1. lease       `<version>.lease`, dated by the store: gc leaves the version alone
    2. statements  attachments first, then the envelope, which is what counts
    3. files       hashed on their way, size and checksum asked back from the store; one that is
                   there whole is skipped
    4. manifest    created exclusively: from here on the version is there for ever
    5. the lease goes

A version carries the digest of its manifest, so two publishers of one version send the same bytes
and need not know of each other. A run that was killed anywhere leaves what no reader counts; the
same call goes on there.

A removal takes the manifest, and with it the version. Its files stay for those who read them, under
a fresh lease; `leftovers` takes what has no manifest a day after the newest object of it, which is
that lease. So gc never takes files that are being published.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import ConflictError, CorruptError, NotFoundError, TransientError
from pipeline.core.values import FileDigest, Package
from pipeline.registry.manifest import MANIFEST, MAX_MANIFEST_BYTES, files_of
from pipeline.registry.paths import path_fault
from pipeline.registry.reference import check_part, reference_of
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
from pipeline.registry.stores.layout import (
    IDENTITY,
    LEASE,
    STATEMENTS,
    lease_key,
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
    Found,
    Objects,
    bounded,
    bounded_kinds,
    in_parallel,
    readable,
    readers,
)
from pipeline.registry.stores.publication import (
    check_statement,
    require_same_manifest,
    sealed_manifest,
)

_MAX_ATTACHMENTS = 16
_SMALL_BYTES = 8 << 20
"""Files up to here are sent side by side; a larger one is sent in parts side by side."""
_MOVE = re.compile(r"([0-9a-f]{64})\.dsse\.json")


@dataclass(frozen=True, kw_only=True)
class TreeStore:
    """`pipeline.registry.store.WritableStore`, over any `Objects`.

    Attributes:
        objects: Where its files lie.
        public: Whether everybody can read it.
        local: Whether what lies there was published on this machine, in a folder.
    """

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

        found = in_parallel(read, filter(is_statement_name, known), readers(self))
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
        return readable(in_parallel(read, kept, readers(self)), what)

    def check_writable(self) -> None:
        self.objects.check_exclusive()

    def put_package(
        self,
        package: Package,
        statements: Sequence[RawStatement],
        on_bytes: OnBytes = lambda _: None,
    ) -> bool:
        place = Place.of(reference_of(package))
        manifest = sealed_manifest(package)
        self.create_identity()
        if self._published(place, manifest):
            return False
        self.objects.replace(lease_key(place), b"published")
        for statement in statements:
            self._put_statement(place, statement)
        files = files_of(package.manifest)
        send = functools.partial(self._send, place, package.dir, on_bytes)
        for _ in in_parallel(send, [file for file in files if file.size_bytes <= _SMALL_BYTES]):
            pass
        for file in files:
            if file.size_bytes > _SMALL_BYTES:
                send(file)
        created = self.objects.create(manifest_key(place), manifest)
        if not self._published(place, manifest):
            raise TransientError(f"{place} was removed while it was published; publish it again")
        self.objects.delete([lease_key(place)])
        return created

    def put_statement(self, place: Place, statement: RawStatement) -> bool:
        if self.objects.find(manifest_key(place)) is None:
            raise NotFoundError(f"{self.url} has no {place}; publish it first")
        return self._put_statement(place, statement)

    def put_move(self, name: str, variant: str, data: bytes) -> bool:
        file = f"{hashlib.sha256(data).hexdigest()}.dsse.json"
        return self.objects.create(f"{moves_key(name, variant)}{file}", data)

    def put_hint(self, name: str, variant: str, channel: str, card: str, data: bytes) -> None:
        file = f"{check_part('channel', channel)}.{check_part('card', card)}.json"
        self.objects.replace(f"{variant_key(name, variant)}/channels/{file}", data)

    def delete_package(self, place: Place) -> int:
        manifest = manifest_key(place)
        if self.objects.find(manifest) is None:
            return 0
        freed = sum(found.size_bytes for found in self.objects.listed(f"{version_key(place)}/"))
        self.objects.replace(lease_key(place), b"removed")
        self.objects.delete([manifest])
        return freed

    def now_s(self) -> float:
        return self.objects.now_s()

    def leftovers(self, min_age_s: float, *, delete: bool) -> list[str]:
        newest_s = self.objects.now_s() - min_age_s
        words = list(self.objects.unfinished(min_age_s, delete=delete))
        versions: dict[Place, dict[str, Found]] = {}
        for found in self.objects.listed(""):
            if (parsed := parse_key(found.key)) is not None:
                versions.setdefault(parsed[0], {})[parsed[1]] = found
        for place, objects in sorted(versions.items(), key=lambda one: one[0]):
            lease, published = objects.get(LEASE), f"/{MANIFEST}" in objects
            if published and lease and lease.modified_s <= newest_s:
                words.append(f"{place} (lease of a publication that is over)")
                if delete:
                    self.objects.delete([lease_key(place)])
            elif not published and max(one.modified_s for one in objects.values()) <= newest_s:
                size_bytes = sum(one.size_bytes for one in objects.values())
                words.append(
                    f"{place} ({len(objects)} files without a manifest, {size_bytes} bytes)"
                )
                if delete:
                    self._remove(place, newest_s)
        return words

    def _put_statement(self, place: Place, statement: RawStatement) -> bool:
        check_statement(statement)
        prefix = f"{statements_key(place)}{statement.name}/"
        there = self.objects.read(f"{prefix}{ENVELOPE}", MAX_ENVELOPE_BYTES)
        for file, data in statement.files.items():
            if file != ENVELOPE and (there is None or self.objects.find(f"{prefix}{file}") is None):
                self.objects.replace(f"{prefix}{file}", data)
        if there is None and self.objects.create(f"{prefix}{ENVELOPE}", statement.envelope):
            return True
        there = there or self.objects.read(f"{prefix}{ENVELOPE}", MAX_ENVELOPE_BYTES)
        if there != statement.envelope:
            raise ConflictError(
                f"{self.url}: another file lies under statement {statement.name} of {place}, and "
                "statements are only ever added; sign this one again, which gives it another name"
            )
        return False

    def _send(self, place: Place, folder: Path, on_bytes: OnBytes, file: FileDigest) -> None:
        key, source = f"{version_key(place)}/{file.path}", folder / file.path
        if self.objects.holds(key, source, file):
            on_bytes(file.size_bytes)
        else:
            self.objects.put_file(key, source, file, on_bytes)

    def _published(self, place: Place, manifest: bytes) -> bool:
        """Whether exactly these bytes are the version's manifest; False if it has none."""
        try:
            there = self.objects.read(manifest_key(place), MAX_MANIFEST_BYTES)
        except CorruptError:
            there = b""
        if there is not None:
            require_same_manifest(there, manifest, self.url, place)
        return there is not None

    def _remove(self, place: Place, newest_s: float) -> None:
        """Remove all of a version, unless a publisher has come meanwhile; the lease last."""
        keys = []
        for prefix in (f"{version_key(place)}/", statements_key(place)):
            for found in self.objects.listed(prefix):
                if found.modified_s > newest_s or found.key == manifest_key(place):
                    return
                keys.append(found.key)
        lease = self.objects.find(lease_key(place))
        if lease is None or lease.modified_s <= newest_s:
            self.objects.delete(keys)
            self.objects.delete([lease_key(place)])

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
