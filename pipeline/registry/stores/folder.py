"""The folder registry's tree as a store; how the tree looks, pipeline.registry.folder tells."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pydantic.dataclasses import dataclass

from pipeline.errors import CorruptError, NotFoundError, RecipeError
from pipeline.registry.disk import disk_errors, open_regular, read_bounded
from pipeline.registry.manifest import MANIFEST, MAX_MANIFEST_BYTES
from pipeline.registry.reference import STATEMENTS_SUFFIX, Part, check_part
from pipeline.registry.stores.store import Place, StoredStatement
from pipeline.settings import STRICT, PathField
from pipeline.stages import FileDigest

_CHUNK_BYTES = 1 << 20
_MAX_STATEMENT_BYTES = 64 << 20
_MAX_POINTER_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FolderStore:
    """`pipeline.registry.stores.store.Store`, in a folder.

    Attributes:
        path: The root.
    """

    path: PathField

    @property
    def url(self) -> str:
        return str(self.path)

    @property
    def public(self) -> bool:
        return False

    @property
    def local(self) -> bool:
        return True

    def names(self) -> list[str]:
        return self._listed(self.path, "name")

    def variants(self, name: str) -> list[str]:
        return self._listed(self.path / check_part("name", name), "variant")

    def versions(self, name: str, variant: str) -> list[str]:
        return self._listed(self._variant(name, variant), "version")

    def read_manifest(self, place: Place) -> bytes:
        folder = self._dir(place)
        with disk_errors(f"read {folder}"):
            if not folder.is_dir():
                raise NotFoundError(f"{self.path} has no {place}")
            return read_bounded(folder / MANIFEST, MAX_MANIFEST_BYTES)

    @contextlib.contextmanager
    def open_file(
        self, place: Place, file: FileDigest, offset: int = 0
    ) -> Iterator[Iterator[bytes]]:
        path = self._dir(place) / file.path
        with disk_errors(f"read {path}"), open_regular(path) as stream:
            stream.seek(offset)
            yield iter(lambda: stream.read(_CHUNK_BYTES), b"")

    def statements(self, place: Place) -> list[StoredStatement]:
        folder = self._statements(place)
        with disk_errors(f"read {folder}"):
            found = [
                StoredStatement(
                    name=name,
                    made_s=(folder / name).stat().st_mtime,
                    sizes={path.name: path.lstat().st_size for path in (folder / name).iterdir()},
                )
                for name in self._listed(folder, "statement")
            ]
        return sorted(found, key=lambda one: (one.made_s, one.name), reverse=True)

    def read_statement(self, place: Place, name: str) -> dict[str, bytes]:
        folder = self._statements(place) / check_part("statement", name)
        with disk_errors(f"read {folder}"):
            if not folder.is_dir():
                raise NotFoundError(f"{place} has no statement {name}")
            return {
                path.name: read_bounded(path, _MAX_STATEMENT_BYTES)
                for path in sorted(folder.iterdir())
            }

    def channels(self, name: str, variant: str) -> dict[str, bytes]:
        return self._small_files(self._variant(name, variant) / "channels")

    def moves(self, name: str, variant: str) -> dict[str, bytes]:
        return self._small_files(self._variant(name, variant) / "channels" / "log")

    def _small_files(self, folder: Path) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        with disk_errors(f"read {folder}"):
            for path in sorted(folder.glob("[!.]*.json")):
                with contextlib.suppress(CorruptError):  # a link or a folder is no channel
                    found[path.name] = read_bounded(path, _MAX_POINTER_BYTES)
        return found

    def _listed(self, folder: Path, part: Part) -> list[str]:
        """Sorted subfolders that are a valid `part`; what else lies there is not ours."""
        names = []
        with disk_errors(f"read {folder}"):
            for path in folder.iterdir() if folder.is_dir() else ():
                with contextlib.suppress(RecipeError):
                    if path.is_dir() and not path.is_symlink():
                        names.append(check_part(part, path.name))
        return sorted(names)

    def _variant(self, name: str, variant: str) -> Path:
        return self.path / check_part("name", name) / check_part("variant", variant)

    def _dir(self, place: Place) -> Path:
        return self._variant(place.name, place.variant) / check_part("version", place.version)

    def _statements(self, place: Place) -> Path:
        folder = self._dir(place)
        return folder.with_name(f"{folder.name}{STATEMENTS_SUFFIX}")
