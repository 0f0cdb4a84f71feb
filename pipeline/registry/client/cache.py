"""One copy of a package for every pull on this machine: `$ENGINESMITH_CACHE/packages`.

A registry in a folder, without an identity and channels: whole packages, read-only, beside them the
trusted statements, and `.pull-<digest>-...` for what is on its way. A package appears by one
rename, never changes, and is verified whenever it is used; a damaged one is fetched again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.cache import cache_root, locked
from pipeline.registry.client.layout import STATEMENTS_SUFFIX, write_statements
from pipeline.registry.disk import disk_errors
from pipeline.registry.store import Place, RawStatement, Store
from pipeline.registry.workfolder import require_private_parent

SETTING = "ENGINESMITH_CACHE"


@dataclass(frozen=True, kw_only=True)
class PackageCache:
    """The cache of packages below `root`, the cache of everything."""

    root: Path

    @property
    def dir(self) -> Path:
        return self.root.absolute() / "packages"

    @property
    def store(self) -> Store:
        """What `--offline` pulls from: it came from anywhere, so a local key does not count."""
        from pipeline.registry.stores.folder import FolderObjects
        from pipeline.registry.stores.tree import TreeStore

        return TreeStore(objects=FolderObjects(path=self.dir))

    def entry(self, place: Place) -> Path:
        """Where a package is, or would be."""
        return self.dir / place.name / place.variant / place.version

    @contextlib.contextmanager
    def locked(self, place: Place) -> Iterator[None]:
        """Hold a version, so that one of many pullers downloads and the others take its entry.

        Raises:
            AccessError: Another user could replace what lies here.
        """
        with disk_errors(f"write {self.dir}", SETTING):
            self.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_private_parent(self.dir, SETTING)
        with locked(self.root / "locks" / f"package-{place.version}.lock"):
            yield

    def keep_statements(self, place: Place, statements: Sequence[RawStatement]) -> None:
        """Add trusted statements to those that are kept."""
        entry = self.entry(place)
        folder = entry.with_name(f"{entry.name}{STATEMENTS_SUFFIX}")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_statements(folder, statements)


def package_cache() -> PackageCache:
    """This machine's."""
    return PackageCache(root=cache_root())
