"""Publishing: what every store checks, and how a tree of objects is written.

A package becomes visible in this order (the registry has its identity before):

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

A bucket or an OCI registry has, for each variant, copies of all that it lists in one file,
`{"<name>": "<text>", ...}`, so that who reads many versions needs few requests:

    <version>  <version>/<statement>  move-<sha256>

Each name ends in digits of the SHA-256 of its text, and without them a copy does not count, so it
does not matter who made it. Who writes into a variant adds to its copies, and two at once may lose
one's; what has no copy is read where it lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from pipeline.core.errors import CorruptError, NotFoundError, PipelineError, TransientError
from pipeline.core.published import FileDigest, Package
from pipeline.registry.disk import CHUNK_BYTES, disk_errors, open_regular
from pipeline.registry.manifest import MANIFEST, digest_bytes, files_of, manifest_bytes
from pipeline.registry.reference import check_part, reference_of
from pipeline.registry.store import (
    ENVELOPE,
    MAX_ATTACHMENT_BYTES,
    MAX_MOVES,
    OnBytes,
    Place,
    RawStatement,
    Store,
    in_parallel,
    is_attachment_name,
    is_named_after,
    is_statement_name,
    limit_dated,
    limit_kinds,
    max_bytes,
)
from pipeline.registry.stores.tree import (
    IDENTITY,
    LOG,
    STATEMENTS,
    Found,
    Objects,
    TreeStore,
    manifest_key,
    moves_key,
    parse_key,
    statements_key,
    variant_key,
    version_key,
)

log = logging.getLogger(__name__)

_LEASE = ".lease"
MAX_COPIES_BYTES = 2 << 20
"""Of all copies of a variant: some 200 versions, the newest. What has no copy is read singly."""
MAX_VERSIONS = 50_000
SETTLE_S = 2.0
"""After it, a gc that saw the old lease of a version has removed what it will."""
_SMALL_BYTES = 8 << 20
"""Files up to here are sent side by side; a larger one is sent in parts side by side."""


@dataclass(frozen=True)
class Listed:
    """What a registry lists of a variant, unread: versions with names of statements, and moves.

    A move is named by digits (hex) that its SHA-256 begins with.
    """

    name: str
    variant: str
    versions: Mapping[Place, tuple[str, ...]]
    moves: tuple[str, ...]


@runtime_checkable
class WritableStore(Store, Protocol):
    """Writes, too, and lists all that there is."""

    def listed(self) -> list[Listed]:
        """What there is of every variant, sorted; in a few requests for all of them."""

    def read_copies(self, name: str, variant: str) -> bytes | None:
        """Copies of what a variant lists; None if there are none."""

    def put_copies(self, name: str, variant: str, data: bytes) -> None:
        """Write copies of what a variant lists, in place of those that were there."""

    def check_writable(self) -> None:
        """Find out, before any work, whether packages can be published here; AccessError if not."""

    def create_identity(self) -> str:
        """The registry's identity; made at random, exclusively, if it has none."""

    def put_package(
        self, package: Package, statements: Sequence[RawStatement], on_bytes: OnBytes
    ) -> bool:
        """Make a sealed package visible, whole and for ever; False if it was there.

        After an interruption the same call completes what was begun, whole file by whole file.
        """

    def put_statement(self, place: Place, statement: RawStatement) -> bool:
        """Add a statement; whole or not at all to its readers. False if it was there.

        NotFoundError without the version.
        """

    def put_move(self, name: str, variant: str, data: bytes) -> bool:
        """Append one move to the log of channels; False if it was there."""

    def put_hint(self, name: str, variant: str, channel: str, card: str, data: bytes) -> None:
        """Write what people read about a channel, in place of what was there; proves nothing."""

    def delete_package(self, place: Place) -> int:
        """Remove a version's manifest, so that it is gone for readers; bytes that this frees."""

    def now_s(self) -> float:
        """Unix time by the clock that dates what is written here."""

    def leftovers(self, min_age_s: float, *, delete: bool) -> list[str]:
        """What no reader sees, of interrupted or removed publications, in words.

        What was touched in the last `min_age_s` may be of a run that goes on, and stays.
        """


def checked_chunks(path: Path, file: FileDigest, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The bytes of a package's file, compared with its SHA-256 before the last ones are given.

    CorruptError if they are not what `file` says; a longer one is not read to its end.
    """
    digest, left = hashlib.sha256(), file.size_bytes
    with disk_errors(f"read {path}"):
        stream = open_regular(path)
    with stream:
        while True:
            chunk = stream.read(min(chunk_bytes, left))
            digest.update(chunk)
            left -= len(chunk)
            is_last = not left or not chunk
            if is_last and (left or stream.read(1) or digest.hexdigest() != file.sha256):
                raise CorruptError(f"{path} is not what its manifest says; get the package again")
            if chunk:
                yield chunk
            if is_last:
                return


def new_identity() -> bytes:
    """A new identity of a registry, as `registry.json`."""
    return json.dumps({"schema": 1, "id": secrets.token_hex(16)}).encode() + b"\n"


def sealed_manifest(package: Package) -> tuple[Place, bytes]:
    """Where a package goes, and the bytes of its manifest; CorruptError without its digest."""
    data = manifest_bytes(package.manifest)
    if digest_bytes(data) != package.digest:
        raise CorruptError(f"{package.dir} does not have the digest {package.digest}; get it again")
    return Place.of(reference_of(package)), data


def list_variants(
    url: str,
    statements: Mapping[Place, Iterable[tuple[float, str]]],
    moves: Mapping[tuple[str, str], Iterable[tuple[float, str]]],
) -> list[Listed]:
    """What a store lists, dated by it, by variant and within the limits."""
    if len(statements) > MAX_VERSIONS:
        raise TransientError(f"{url} lists more than {MAX_VERSIONS} versions; make it smaller")
    found: dict[tuple[str, str], dict[Place, tuple[str, ...]]] = {}
    for place in sorted(statements):
        names = limit_kinds(statements[place], f"{url}: statements of {place}")
        found.setdefault((place.name, place.variant), {})[place] = tuple(names)
    kept = {
        of: tuple(limit_dated(moves.get(of, ()), MAX_MOVES, f"{url}: moves of {'/'.join(of)}"))
        for of in found
    }
    return [Listed(*of, versions, kept[of]) for of, versions in found.items()]


def unpack(data: bytes | None) -> dict[str, bytes]:
    """Name -> bytes of the copies that count; none of a file that is no such file."""
    try:
        found = {name: text.encode() for name, text in json.loads(data or "{}").items()}
    except (ValueError, RecursionError, AttributeError):
        return {}
    return {name: data for name, data in found.items() if is_named_after(name, data)}


def pack(copies: dict[str, bytes], limit_bytes: int = MAX_COPIES_BYTES) -> bytes:
    """The file of some copies, the last ones as far as they fit; what is no text counts no more."""
    lines: list[str] = []
    for name, data in reversed(copies.items()):
        lines.append(f"{json.dumps(name)}: {json.dumps(data.decode(errors='replace'))}")
        limit_bytes -= len(lines[-1]) + 2
        if limit_bytes < 4:
            lines.pop()
            break
    return "{{\n{}\n}}\n".format(",\n".join(reversed(lines))).encode()


def copy_of(
    place: Place, statements: Sequence[RawStatement], manifest: bytes | None = None
) -> dict[str, bytes]:
    """Copies of what is published about a version."""
    found = {} if manifest is None else {place.version: manifest}
    return found | {f"{place.version}/{one.name}": one.envelope for one in statements}


def add_copies(store: WritableStore, name: str, variant: str, copies: dict[str, bytes]) -> None:
    """Add to the copies of a variant, where the next `list` looks; nothing is lost if it fails."""
    known: dict[str, bytes] = {}
    with contextlib.suppress(PipelineError):
        with contextlib.suppress(CorruptError):
            known = copies if store.local else unpack(store.read_copies(name, variant))
        if not known.items() >= copies.items():
            store.put_copies(name, variant, pack({**known, **copies}))


def check_statement(statement: RawStatement) -> None:
    """Stop a statement that no store takes, by a ValueError: a mistake of the program."""
    attachments = {file: data for file, data in statement.files.items() if file != ENVELOPE}
    if not is_statement_name(statement.name) or not all(map(is_attachment_name, attachments)):
        raise ValueError(f"statement {statement.name!r} with files {sorted(attachments)}")
    largest = max(map(len, attachments.values()), default=0)
    if len(statement.envelope) > max_bytes(statement.name) or largest > MAX_ATTACHMENT_BYTES:
        raise ValueError(f"statement {statement.name} is too large")


class WritableObjects(Objects, Protocol):
    """Writes, too."""

    def find(self, key: str) -> Found | None:
        """What is known of one object; None if there is none."""

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object unless its key is taken; whether this call has created it."""

    def replace(self, key: str, data: bytes) -> None:
        """Write a small object in place of what was there."""

    def put_file(self, key: str, source: Path, file: FileDigest, on_bytes: OnBytes) -> None:
        """Write a file of a package, hashed on its way, in place of what was there.

        CorruptError if it is not what `file` says, here or as the store has it.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects, those that are there."""

    def now_s(self) -> float:
        """Unix time by the clock that dates objects."""

    def unfinished(self, min_age_s: float, *, delete: bool) -> Iterator[str]:
        """What interrupted runs left that is no object, at least so old, in words."""

    def check_writable(self) -> None:
        """See `WritableStore`."""


def holds(objects: WritableObjects, key: str, file: FileDigest) -> bool:
    """Whether a key holds a file's bytes: by their SHA-256, as others may have written it."""
    found = objects.find(key)
    if found is None or found.size_bytes != file.size_bytes:
        return False
    digest = hashlib.sha256()
    with contextlib.suppress(NotFoundError), objects.stream(key, 0, None) as chunks:
        for chunk in chunks:
            digest.update(chunk)
    return digest.hexdigest() == file.sha256


@dataclass(frozen=True, kw_only=True)
class WritableTree(TreeStore):
    """`WritableStore`, over any `WritableObjects`."""

    objects: WritableObjects

    def listed(self) -> list[Listed]:
        published: list[Place] = []
        about: dict[Place, list[tuple[float, str]]] = {}
        moves: dict[tuple[str, str], list[tuple[float, str]]] = {}
        for found in self.objects.listed(""):
            if match := LOG.fullmatch(found.key):
                of = match[1], match[2]
                moves.setdefault(of, []).append((found.modified_s, match[3]))
            elif (parsed := parse_key(found.key)) is not None:
                place, rest = parsed
                statement, _, file = rest.removeprefix(STATEMENTS).partition("/")
                if rest == f"/{MANIFEST}":
                    published.append(place)
                elif file == ENVELOPE and is_statement_name(statement):
                    about.setdefault(place, []).append((found.modified_s, statement))
        return list_variants(self.url, {one: about.get(one, []) for one in published}, moves)

    def create_identity(self) -> str:
        if (there := self.identity()) is not None:
            return there
        self.objects.create(IDENTITY, new_identity())
        made = self.identity()
        if made is None:
            raise NotFoundError(f"{self.url}: {IDENTITY} was removed while it was made; try again")
        return made

    def check_writable(self) -> None:
        self.objects.check_writable()

    def put_package(
        self, package: Package, statements: Sequence[RawStatement], on_bytes: OnBytes
    ) -> bool:
        place, manifest = sealed_manifest(package)
        self.create_identity()
        if self._holds(manifest_key(place), manifest):
            return False
        was_here = self.objects.find(_lease_key(place)) is not None
        self.objects.replace(_lease_key(place), b"published")
        if was_here:  # a gc that looked before may be removing what was left
            time.sleep(SETTLE_S)
        files = files_of(package.manifest)
        wanted = {f"{version_key(place)}/{file.path}" for file in files}
        wanted |= {f"{statements_key(place)}{one.name}/{ENVELOPE}" for one in statements}

        def send(file: FileDigest) -> None:
            key, source = f"{version_key(place)}/{file.path}", package.dir / file.path
            if holds(self.objects, key, file):
                on_bytes(file.size_bytes)
            else:
                self.objects.put_file(key, source, file, on_bytes)

        # Again if a gc that looked before our lease came took what was found of a removed version.
        for _ in range(2):
            for statement in statements:
                self._put_statement(place, statement)
            small = [file for file in files if file.size_bytes <= _SMALL_BYTES]
            for _ in in_parallel(send, small):
                pass
            for file in files:
                if file.size_bytes > _SMALL_BYTES:
                    send(file)
            if wanted <= {found.key for found in self._listed_of(place)}:
                break
            on_bytes(-sum(file.size_bytes for file in files))
        created = self._put(manifest_key(place), manifest)
        if not self._holds(manifest_key(place), manifest):
            raise TransientError(f"{place} was removed while it was published; publish it again")
        self.objects.delete([_lease_key(place)])
        add_copies(self, place.name, place.variant, copy_of(place, statements, manifest))
        return created

    def put_statement(self, place: Place, statement: RawStatement) -> bool:
        if self.objects.find(manifest_key(place)) is None:
            raise NotFoundError(f"{self.url} has no {place}; publish it first")
        if new := self._put_statement(place, statement):
            add_copies(self, place.name, place.variant, copy_of(place, [statement]))
        return new

    def put_move(self, name: str, variant: str, data: bytes) -> bool:
        digest = hashlib.sha256(data).hexdigest()
        if new := self._put(f"{moves_key(name, variant)}{digest}.dsse.json", data):
            add_copies(self, name, variant, {f"move-{digest}": data})
        return new

    def put_hint(self, name: str, variant: str, channel: str, card: str, data: bytes) -> None:
        file = f"{check_part('channel', channel)}.{check_part('card', card)}.json"
        self.objects.replace(f"{variant_key(name, variant)}/channels/{file}", data)

    def put_copies(self, name: str, variant: str, data: bytes) -> None:
        self.objects.replace(_copies_key(name, variant), data)

    def read_copies(self, name: str, variant: str) -> bytes | None:
        return self.objects.read(_copies_key(name, variant), MAX_COPIES_BYTES)

    def delete_package(self, place: Place) -> int:
        manifest = manifest_key(place)
        if self.objects.find(manifest) is None:
            return 0
        freed = sum(found.size_bytes for found in self.objects.listed(f"{version_key(place)}/"))
        self.objects.replace(_lease_key(place), b"removed")
        self.objects.delete([manifest])
        return freed

    def now_s(self) -> float:
        return self.objects.now_s()

    def leftovers(self, min_age_s: float, *, delete: bool) -> list[str]:
        newest_s = self.objects.now_s() - min_age_s
        words = list(self.objects.unfinished(min_age_s, delete=delete))
        versions: dict[Place, tuple[int, int] | None] = {}  # None for one that stays
        for found in self.objects.listed(""):
            if (parsed := parse_key(found.key)) is not None:
                sums = versions.get(parsed[0], (0, 0))
                if sums is None or parsed[1] == f"/{MANIFEST}" or found.modified_s > newest_s:
                    versions[parsed[0]] = None
                else:
                    versions[parsed[0]] = sums[0] + 1, sums[1] + found.size_bytes
        for place in sorted(versions):
            if (sums := versions[place]) is not None:
                what = "{} files without a manifest, {} bytes".format(*sums)
                words.append(f"{place} ({what})")
                if delete:
                    self._remove(place, newest_s)
        return words

    def _put_statement(self, place: Place, statement: RawStatement) -> bool:
        check_statement(statement)
        prefix = f"{statements_key(place)}{statement.name}/"
        there = self._holds(f"{prefix}{ENVELOPE}", statement.envelope)
        for file, data in statement.files.items():
            if file != ENVELOPE and not (there and self.objects.find(f"{prefix}{file}")):
                self.objects.replace(f"{prefix}{file}", data)
        return self._put(f"{prefix}{ENVELOPE}", statement.envelope)

    def _put(self, key: str, data: bytes) -> bool:
        """Create an object whose key follows from its content; False if it was there.

        What else lies there is rubbish, which would stop this publisher, and is replaced.
        """
        if self._holds(key, data):
            return False
        if not self.objects.create(key, data):
            if self._holds(key, data):
                return False
            log.warning("%s: what was under %s is not that; replaced", self.url, key)
            self.objects.replace(key, data)
        return True

    def _holds(self, key: str, data: bytes) -> bool:
        with contextlib.suppress(CorruptError):
            return self.objects.read(key, len(data)) == data
        return False

    def _listed_of(self, place: Place) -> Iterator[Found]:
        for prefix in (f"{version_key(place)}/", statements_key(place)):
            yield from self.objects.listed(prefix)

    def _remove(self, place: Place, newest_s: float) -> None:
        """Remove all of a version, unless a publisher has come meanwhile; the lease last."""
        keys = []
        for found in self._listed_of(place):
            if found.modified_s > newest_s or found.key == manifest_key(place):
                return
            keys.append(found.key)
        lease = self.objects.find(_lease_key(place))
        if lease is None or lease.modified_s <= newest_s:
            # The lease goes alone, in a later gc: a publisher sees by it that one may be at work.
            self.objects.delete(keys or [_lease_key(place)])


def _lease_key(place: Place) -> str:
    return f"{version_key(place)}{_LEASE}"


def _copies_key(name: str, variant: str) -> str:
    return f"{variant_key(name, variant)}/copies.json"
