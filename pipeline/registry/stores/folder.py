"""A store in a folder: the published tree that any web server or `ls` can read.

    <root>/<name>/<variant>/<version>/manifest.json, engine/    one package, never changed
    <root>/<name>/<variant>/<version>.statements/<statement>/   append-only
    <root>/<name>/<variant>/channels/<channel>.<card>.json      pointers that move
    <root>/<name>/<variant>/channels/log/                       their moves, append-only
    <root>/.staging/                                            ours, empty between runs

A package becomes visible by one rename that cannot overwrite (see `disk`), after its signatures.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pydantic.dataclasses import dataclass

from pipeline.core.errors import (
    AccessError,
    ConflictError,
    CorruptError,
    NotFoundError,
    RecipeError,
)
from pipeline.core.settings import STRICT, PathField
from pipeline.core.values import FileDigest, Package
from pipeline.registry.disk import (
    disk_errors,
    file_system_now_s,
    link_new,
    move_into_place,
    open_regular,
    read_bounded,
    replace_file,
    settle,
    write_new,
)
from pipeline.registry.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    digest_bytes,
    manifest_bytes,
)
from pipeline.registry.package import verify
from pipeline.registry.reference import STATEMENTS_SUFFIX, Part, check_part, reference_of
from pipeline.registry.staging import abandoned, private_folder
from pipeline.registry.stores.store import Place, StoredStatement

_CHUNK_BYTES = 256 << 10
"""1 GiB in writes of 256 KiB took 0.13, 0.17 and 0.33 s, of 1 MiB 0.10, 0.18 and 1.43 s, of 16 MiB
0.8 to 2.0 s (ext4, Linux 6.18, one run each, measured 2026-11-25; why is not known)."""
_MAX_STATEMENT_BYTES = 64 << 20
_MAX_POINTER_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FolderStore:
    """`pipeline.registry.stores.store.WritableStore`, in a folder.

    Attributes:
        path: The root; made when something is published.
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
        folder = self.location(place)
        with disk_errors(f"read {folder}"):
            if not folder.is_dir():
                raise NotFoundError(f"{self.path} has no {place}")
            return read_bounded(folder / MANIFEST, MAX_MANIFEST_BYTES)

    @contextlib.contextmanager
    def open_file(
        self, place: Place, file: FileDigest, offset: int = 0, end: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        path = self.location(place) / file.path
        with disk_errors(f"read {path}"), open_regular(path) as stream:
            stream.seek(offset)
            yield iter(lambda: stream.read(_CHUNK_BYTES), b"")

    def statements(self, place: Place) -> list[StoredStatement]:
        folder = self.statements_dir(place)
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
        folder = self.statements_dir(place) / check_part("statement", name)
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

    def check_writable(self) -> None:
        with disk_errors(f"publish to {self.path}", "registry.path="):
            existing = self.path
            while not existing.exists() and existing != existing.parent:
                existing = existing.parent
            if not existing.is_dir():
                raise AccessError(
                    f"cannot publish to {self.path}: {existing} is not a folder; "
                    "choose another with registry.path="
                )
            with tempfile.NamedTemporaryFile(prefix=".writable-", dir=existing) as stream:
                stream.write(b"\0")  # a full disk still makes empty files
                stream.flush()

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A private, empty folder on the store's own file system; gone after the block.

        A package that is sealed in it is moved by `put_package`, not copied.
        """
        with contextlib.ExitStack() as stack:
            with disk_errors(f"prepare a package in {self.path}"):
                folder = stack.enter_context(private_folder(self._staging))
            yield folder

    def put_package(
        self,
        package: Package,
        statements: Mapping[str, Mapping[str, bytes]],
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> bool:
        place = Place.of(reference_of(package))
        target = self.location(place)
        with disk_errors(f"publish {place} to {self.path}"), contextlib.ExitStack() as stack:
            if _taken(target):
                self._require_same(place, package.digest)
                return False
            if package.dir.parent == self._staging:
                private = _unchanged(package)
            else:
                private = stack.enter_context(private_folder(self._staging))
                _copy(package, private, on_bytes)
            settle(private)
            for name, files in statements.items():
                self._write_statement(place, name, files)
            if move_into_place(private, target):
                return True
            self._require_same(place, package.digest)
            return False

    def put_statement(self, place: Place, name: str, files: Mapping[str, bytes]) -> bool:
        target = self.statements_dir(place) / check_part("statement", name)
        if not self.location(place).is_dir():
            raise NotFoundError(f"{self.location(place)} does not exist; publish {place} first")
        with disk_errors(f"write {target}"):
            if self._write_statement(place, name, files):
                return True
            if _folder_bytes(target) != dict(files):
                raise ConflictError(
                    f"{target} holds other bytes; statements are only ever added, "
                    "so give this one another name"
                )
        return False

    def put_move(self, name: str, variant: str, file: str, data: bytes) -> None:
        target = self._variant(name, variant) / "channels" / "log" / check_part("statement", file)
        with disk_errors(f"write {target}"), private_folder(self._staging) as private:
            write_new(private / file, data)
            settle(private)
            if not link_new(private / file, target):
                raise ConflictError(f"{target} exists; somebody else moved this channel meanwhile")

    def put_channel(self, name: str, variant: str, file: str, data: bytes) -> None:
        target = self._variant(name, variant) / "channels" / check_part("statement", file)
        with disk_errors(f"write {target}"), private_folder(self._staging) as private:
            write_new(private / file, data)
            replace_file(private / file, target)

    def delete_version(self, place: Place) -> int:
        freed = 0
        with disk_errors(f"remove {place} of {self.path}"), private_folder(self._staging) as away:
            # The package first: statements without a package are seen by nobody.
            for folder in (self.location(place), self.statements_dir(place)):
                if folder.is_dir():
                    freed += _size_bytes(folder)
                    folder.rename(away / folder.name)
        return freed

    def now_s(self) -> float:
        try:
            return file_system_now_s(self.path)
        except OSError:  # read-only: nothing can be removed by this date
            return time.time()

    def leftovers(self, min_age_s: float, *, delete: bool) -> list[str]:
        with disk_errors(f"clean {self.path}"):
            now_s = self.now_s()
            newest_s = now_s - min_age_s
            found = [(path, "left by a run") for path in abandoned(self._staging, newest_s, now_s)]
            for path in self.path.glob(f"[!.]*/*/*{STATEMENTS_SUFFIX}"):
                version = path.with_name(path.name.removesuffix(STATEMENTS_SUFFIX))
                if not _taken(version) and path.stat().st_mtime <= newest_s:
                    found.append((path, "statements of a version that is not there"))
            words = [
                f"{path.relative_to(self.path)} ({why}, {_size_bytes(path)} bytes)"
                for path, why in found
            ]
            for path, _ in found if delete else ():
                shutil.rmtree(path, ignore_errors=True)
        return sorted(words)

    def location(self, place: Place) -> Path:
        """The folder of a version."""
        return self._variant(place.name, place.variant) / check_part("version", place.version)

    def statements_dir(self, place: Place) -> Path:
        """The folder of what is said about it."""
        folder = self.location(place)
        return folder.with_name(f"{folder.name}{STATEMENTS_SUFFIX}")

    def quarantine(self, place: Place) -> str:
        """How to put a damaged version aside, in words."""
        aside = self.path / f".damaged-{place.name}-{place.version}"
        return f"To put the damaged one aside: mv {self.location(place)} {aside}"

    def _write_statement(self, place: Place, name: str, files: Mapping[str, bytes]) -> bool:
        """Make a statement visible, whole; False if its name is taken, whatever is there."""
        if not files:
            raise ValueError(f"statement {name} has no files")
        target = self.statements_dir(place) / check_part("statement", name)
        with private_folder(self._staging) as private:
            for file, data in files.items():
                write_new(private / check_part("statement", file), data)
            settle(private)
            return move_into_place(private, target)

    def _require_same(self, place: Place, digest: str) -> None:
        """Raise unless what is published under this version has this digest and is whole."""
        folder = self.location(place)
        advice = "nothing was overwritten; run the same command with --rebuild to publish beside it"
        try:
            published = verify(folder)
        except CorruptError as error:
            raise ConflictError(
                f"{place} is taken by a damaged package ({error}); {advice}. "
                f"{self.quarantine(place)}"
            ) from error
        if published.digest != digest:
            raise ConflictError(
                f"{place} is already published with other bytes (digest "
                f"{published.digest[:12]}, these have {digest[:12]}); {advice}"
            )

    @property
    def _staging(self) -> Path:
        return self.path / ".staging"

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


def _taken(folder: Path) -> bool:
    """Whether a version is there; a rename takes an empty folder for a free name."""
    if folder.is_dir() and not folder.is_symlink():
        return any(folder.iterdir())
    return os.path.lexists(folder)


def _unchanged(package: Package) -> Path:
    """The folder of a sealed package, every byte as it was sealed."""
    if verify(package.dir).digest != package.digest:
        raise CorruptError(f"{package.dir} changed since it was sealed; build it again")
    return package.dir


def _copy(package: Package, private: Path, on_bytes: Callable[[int], None]) -> None:
    """Copy a package, hashing what is written; its manifest last."""
    data = manifest_bytes(package.manifest)
    if digest_bytes(data) != package.digest:
        raise CorruptError(f"{package.dir} has not the digest {package.digest}; get it again")
    for file in package.manifest["files"]:
        source, target = package.dir / file["path"], private / file["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with open_regular(source) as reader, target.open("xb") as writer:
            while chunk := reader.read(_CHUNK_BYTES):
                digest.update(chunk)
                writer.write(chunk)
                on_bytes(len(chunk))
                if writer.tell() > file["size"]:
                    break  # its digest is wrong, and a disk need not be filled to know that
        if digest.hexdigest() != file["sha256"]:
            raise CorruptError(f"{source} is not what its manifest says; get the package again")
    write_new(private / MANIFEST, data)


def _size_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _folder_bytes(folder: Path) -> dict[str, bytes] | None:
    """Content of every file of a statement; None if it is no such folder."""
    try:
        return {
            path.name: read_bounded(path, path.lstat().st_size) for path in sorted(folder.iterdir())
        }
    except (CorruptError, NotADirectoryError):
        return None
