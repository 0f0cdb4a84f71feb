"""The cache as a store: what `--offline` pulls from, without network, credentials or channels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import CorruptError, NotFoundError, RecipeError
from pipeline.core.values import FileDigest
from pipeline.registry.client.cache import PackageCache
from pipeline.registry.disk import read_bounded
from pipeline.registry.manifest import MANIFEST, MAX_MANIFEST_BYTES, read_manifest
from pipeline.registry.reference import check_digest, check_part
from pipeline.registry.stores.store import Place, StoredStatement

_MAX_STATEMENT_BYTES = 64 << 20
_CHUNK_BYTES = 256 << 10


@dataclass(frozen=True, kw_only=True)
class CacheStore:
    """`pipeline.registry.stores.store.Store`, over a cache.

    Attributes:
        cache: The cache.
        only: Shows this digest alone; None for all. Two registries may give one version to
            different bytes.
    """

    cache: PackageCache
    only: str | None = None

    @property
    def url(self) -> str:
        return str(self.cache.dir)

    @property
    def public(self) -> bool:
        return False

    @property
    def local(self) -> bool:
        # What lies here came from anywhere: a local key does not count for it.
        return False

    def names(self) -> list[str]:
        return sorted({place.name for place in self._held()})

    def variants(self, name: str) -> list[str]:
        return sorted({place.variant for place in self._held() if place.name == name})

    def versions(self, name: str, variant: str) -> list[str]:
        held = self._held()
        return sorted(one.version for one in held if (one.name, one.variant) == (name, variant))

    def read_manifest(self, place: Place) -> bytes:
        return read_bounded(self.cache.entry(self._digest(place)) / MANIFEST, MAX_MANIFEST_BYTES)

    @contextlib.contextmanager
    def open_file(
        self, place: Place, file: FileDigest, offset: int = 0, end: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        with (self.cache.entry(self._digest(place)) / file.path).open("rb") as stream:
            stream.seek(offset)
            yield iter(lambda: stream.read(_CHUNK_BYTES), b"")

    def statements(self, place: Place) -> list[StoredStatement]:
        folder = self.cache.statements(self._digest(place))
        found = []
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            with contextlib.suppress(RecipeError):
                if path.is_dir():
                    sizes = {one.name: one.lstat().st_size for one in path.iterdir()}
                    name, made_s = check_part("statement", path.name), path.stat().st_mtime
                    found.append(StoredStatement(name=name, made_s=made_s, sizes=sizes))
        return sorted(found, key=lambda one: (one.made_s, one.name), reverse=True)

    def read_statement(self, place: Place, name: str) -> dict[str, bytes]:
        folder = self.cache.statements(self._digest(place)) / check_part("statement", name)
        return {
            path.name: read_bounded(path, _MAX_STATEMENT_BYTES) for path in sorted(folder.iterdir())
        }

    def channels(self, name: str, variant: str) -> dict[str, bytes]:
        return {}

    def moves(self, name: str, variant: str) -> dict[str, bytes]:
        return {}

    def _digest(self, place: Place) -> str:
        try:
            return self._held()[place]
        except KeyError:
            raise NotFoundError(f"{self.url} has no {place}") from None

    def _held(self) -> dict[Place, str]:
        """What is there; entries whose manifest cannot be read are nobody's."""
        held: dict[Place, str] = {}
        folders = sorted(self.cache.dir.iterdir()) if self.cache.dir.is_dir() else []
        for folder in folders:
            with contextlib.suppress(RecipeError, CorruptError):
                digest = check_digest(folder.name)
                if self.only in {None, digest} and folder.is_dir():
                    held[_place(folder)] = digest
        return held


def _place(folder: Path) -> Place:
    manifest, _ = read_manifest(folder / MANIFEST)
    return Place(**{part: str(manifest[part]) for part in ("name", "variant", "version")})
