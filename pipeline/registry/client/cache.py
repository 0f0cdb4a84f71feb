"""One copy per digest for every pull on this machine: `$ENGINESMITH_CACHE/packages`.

    packages/<digest>/               manifest.json, engine/: a whole package, read-only
    packages/<digest>.statements/    trusted statements, to verify the entry offline
    packages/.pull-<digest>-...      on its way; see `pipeline.registry.workfolder`

An entry appears by one rename, never changes, and is verified whenever it is used; a damaged one is
removed and fetched again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.cache import locked
from pipeline.core.errors import CorruptError, NotFoundError, RecipeError
from pipeline.core.values import FileDigest
from pipeline.registry.client.layout import (
    STATEMENTS_SUFFIX,
    move_into_place,
    read_statements,
    write_statements,
)
from pipeline.registry.disk import disk_errors, open_regular, read_bounded
from pipeline.registry.manifest import MANIFEST, MAX_MANIFEST_BYTES, read_manifest
from pipeline.registry.reference import check_digest, derive_version
from pipeline.registry.store import NONE_KNOWN, Place, RawStatement
from pipeline.registry.workfolder import remove_folder, require_private_parent

log = logging.getLogger(__name__)

SETTING = "ENGINESMITH_CACHE"
_READ_BYTES = 256 << 10


@dataclass(frozen=True, kw_only=True)
class PackageCache:
    """The cache of packages below `root`, the cache of everything."""

    root: Path

    @property
    def dir(self) -> Path:
        return self.root.absolute() / "packages"

    def entry(self, digest: str) -> Path:
        """Where the package with this digest is, or would be."""
        return self.dir / check_digest(digest)

    def statements(self, digest: str) -> Path:
        """What was stated about it."""
        return self.dir / f"{check_digest(digest)}{STATEMENTS_SUFFIX}"

    @contextlib.contextmanager
    def locked(self, digest: str) -> Iterator[None]:
        """Hold a digest, so that one of many pullers downloads and the others take its entry.

        Raises:
            AccessError: Another user could replace what lies here.
        """
        with disk_errors(f"write {self.dir}", SETTING):
            self.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_private_parent(self.dir, SETTING)
        with locked(self.root / "locks" / f"package-{check_digest(digest)[:24]}.lock"):
            yield

    def keep(self, package_dir: Path, digest: str) -> None:
        """Make a whole, verified, settled package an entry; if there is one already, it stays."""
        move_into_place(package_dir, self.entry(digest))

    def keep_statements(self, digest: str, statements: Sequence[RawStatement]) -> None:
        """Add trusted statements to those that are kept."""
        folder = self.statements(digest)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_statements(folder, statements)

    def drop(self, digest: str, reason: CorruptError) -> None:
        """Remove a damaged entry."""
        log.warning("%s; fetching it again", reason)
        remove_folder(self.entry(digest))


@dataclass(frozen=True, kw_only=True)
class CacheStore:
    """`pipeline.registry.store.Store`, over a cache: what `--offline` pulls from."""

    cache: PackageCache

    @property
    def url(self) -> str:
        return str(self.cache.dir)

    @property
    def public(self) -> bool:
        return False

    @property
    def local(self) -> bool:
        return False  # what lies here came from anywhere: a local key does not count for it

    def identity(self) -> str | None:
        return None

    def places(self, name: str | None = None, variant: str | None = None) -> list[Place]:
        return sorted(
            place
            for place in self._held()
            if name in {None, place.name} and variant in {None, place.variant}
        )

    def statement_names(
        self, name: str | None = None, variant: str | None = None
    ) -> dict[Place, tuple[str, ...]]:
        return {
            place: tuple(statement.name for statement in self.read_statements(place))
            for place in self.places(name, variant)
        }

    def read_manifest(self, place: Place) -> bytes:
        return read_bounded(self.cache.entry(self._digest(place)) / MANIFEST, MAX_MANIFEST_BYTES)

    @contextlib.contextmanager
    def open_file(
        self, place: Place, file: FileDigest, offset: int = 0, end: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        with open_regular(self.cache.entry(self._digest(place)) / file.path) as stream:
            stream.seek(offset)
            yield iter(lambda: stream.read(_READ_BYTES), b"")

    def read_statements(
        self, place: Place, names: Collection[str] | None = None
    ) -> list[RawStatement]:
        found = read_statements(self.cache.statements(self._digest(place)))
        return [one for one in found if names is None or one.name in names]

    def read_statement(self, place: Place, name: str) -> RawStatement:
        for statement in self.read_statements(place, {name}):
            return statement
        raise NotFoundError(f"{self.url} has no statement {name} of {place}")

    def read_moves(
        self, name: str, variant: str, known: Mapping[str, bytes] = NONE_KNOWN
    ) -> list[bytes]:
        return []

    def _digest(self, place: Place) -> str:
        try:
            return self._held()[place]
        except KeyError:
            raise NotFoundError(f"{self.url} has no {place}") from None

    def _held(self) -> dict[Place, str]:
        """What is there; a folder that is no entry, or is damaged, is passed over."""
        held: dict[Place, str] = {}
        for folder in sorted(self.cache.dir.iterdir()) if self.cache.dir.is_dir() else ():
            with contextlib.suppress(RecipeError, CorruptError):
                digest = check_digest(folder.name)
                manifest, found = read_manifest(folder / MANIFEST)
                if found == digest:
                    place = Place(
                        name=manifest["name"],
                        variant=manifest["variant"],
                        version=derive_version(manifest, digest),
                    )
                    held[place] = digest
        return held
