"""A registry in a folder: of this machine, or on a network file system.

A file becomes visible by one `link(2)` or `rename(2)` from `<root>/.staging`, whole and on the
disk; links are not followed. A package that is sealed below `.staging` is moved, not copied.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pydantic.dataclasses

from pipeline.core.errors import AccessError, NotFoundError
from pipeline.core.settings import STRICT, PathField
from pipeline.core.values import FileDigest
from pipeline.core.workfolder import remove_folder, sync, work_folder
from pipeline.registry.disk import (
    CHUNK_BYTES,
    checked_chunks,
    disk_errors,
    make_folders,
    open_regular,
    read_bounded,
    write_new,
)
from pipeline.registry.store import OnBytes
from pipeline.registry.stores.tree import Found, TreeStore

if TYPE_CHECKING:
    from pipeline.registry.stores.publication import WritableStore

STAGING = ".staging"
# What link(2) says on a file system without hard links.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_TRIES = 3


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class FolderRegistry:
    """A registry in a folder, as a recipe names it; made when something is published."""

    path: PathField

    def reader(self) -> TreeStore:
        return TreeStore(objects=FolderObjects(path=self.path), local=True)

    def store(self) -> WritableStore:
        from pipeline.registry.stores.publication import WritableTree

        return WritableTree(objects=FolderObjects(path=self.path), local=True)


@dataclass(frozen=True, kw_only=True)
class FolderObjects:
    """`WritableObjects` of `pipeline.registry.stores.publication`, in a folder."""

    path: Path

    @property
    def url(self) -> str:
        return str(self.path)

    def find(self, key: str) -> Found | None:
        with disk_errors(f"read {self.path / key}"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                status = (self.path / key).lstat()
                return _found(key, status) if stat.S_ISREG(status.st_mode) else None
            return None

    def listed(self, prefix: str) -> Iterator[Found]:
        with disk_errors(f"read {self.path / prefix}"):
            yield from _walk(self.path / prefix, prefix)

    def read(self, key: str, limit_bytes: int) -> bytes | None:
        with disk_errors(f"read {self.path / key}"):
            if not os.path.lexists(self.path / key):
                return None
            return read_bounded(self.path / key, limit_bytes)

    @contextlib.contextmanager
    def stream(self, key: str, offset: int, end: int | None) -> Iterator[Iterator[bytes]]:
        path = self.path / key
        with disk_errors(f"read {path}"):
            if not os.path.lexists(path):
                raise NotFoundError(f"{path} is missing")
            with open_regular(path) as stream:
                stream.seek(offset)
                yield iter(lambda: stream.read(CHUNK_BYTES), b"")

    def create(self, key: str, data: bytes) -> bool:
        with self._written(key) as new:
            write_new(new, data)
            return _link_new(new, self.path / key)

    def replace(self, key: str, data: bytes) -> None:
        with self._written(key) as new:
            write_new(new, data)
            _replace_file(new, self.path / key)

    def put_file(self, key: str, source: Path, file: FileDigest, on_bytes: OnBytes) -> None:
        with self._written(key) as new:
            ours = source.resolve().is_relative_to(new.parents[1])
            with contextlib.nullcontext() if ours else new.open("xb") as writer:
                for chunk in checked_chunks(source, file):
                    if writer is not None:
                        writer.write(chunk)
                    on_bytes(len(chunk))
            if ours:
                source.rename(new)
            _replace_file(new, self.path / key)

    def holds(self, key: str, source: Path, file: FileDigest) -> bool:
        found = self.find(key)
        if found is None or found.size_bytes != file.size_bytes:
            return False
        with disk_errors(f"read {self.path / key}"), open_regular(self.path / key) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256

    def delete(self, keys: Iterable[str]) -> None:
        """See the Protocol; folders that are empty then go, too."""
        for key in keys:
            path = self.path / key
            with disk_errors(f"remove {path}"):
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty, or another process was faster
                    for folder in path.relative_to(self.path).parents[:-1]:
                        (self.path / folder).rmdir()

    def now_s(self) -> float:
        """By the clock that dates what is written here: that of a network file system's server."""
        try:
            os.utime(self.path)  # works on a full disk, where a new file would not
            return self.path.stat().st_mtime
        except OSError:  # read-only or not there: nothing can be removed by this date
            return time.time()

    def unfinished(self, min_age_s: float, *, delete: bool) -> Iterator[str]:
        """See the Protocol; what is younger goes when something is published the next time."""
        newest_s, staging = self.now_s() - min_age_s, self.path / STAGING
        with disk_errors(f"clean {self.path}"):
            for path in sorted(staging.iterdir()) if staging.is_dir() else ():
                with contextlib.suppress(FileNotFoundError):  # its owner has ended
                    if path.lstat().st_mtime <= newest_s:
                        if delete:
                            remove_folder(path)
                        yield f"{path.relative_to(self.path)} (left by a run)"

    def check_writable(self) -> None:
        with disk_errors(f"publish to {self.path}", "registry.path="):
            existing = self.path
            while not existing.exists() and existing != existing.parent:
                existing = existing.parent
            if not existing.is_dir():
                fault = f"cannot publish to {self.path}: {existing} is not a folder"
                raise AccessError(f"{fault}; choose another with registry.path=")
            with tempfile.NamedTemporaryFile(prefix=".writable-", dir=existing) as stream:
                stream.write(b"\0")  # a full disk still makes empty files
                stream.flush()

    @contextlib.contextmanager
    def _written(self, key: str) -> Iterator[Path]:
        """Where to write what becomes `key`; on the same file system."""
        with disk_errors(f"write {self.path / key}"):
            make_folders(self.path / STAGING)
            with work_folder(self.path / STAGING, "write-") as work:
                yield work.dir / "new"


def _walk(folder: Path, prefix: str) -> Iterator[Found]:
    """All plain files below a folder, sorted; hidden ones at the top and links are not ours."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR}:  # also: removed while we walked
            return
        raise
    for entry in entries:
        if not prefix and entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/")
        elif entry.is_file(follow_symlinks=False):
            with contextlib.suppress(FileNotFoundError):
                yield _found(f"{prefix}{entry.name}", entry.stat(follow_symlinks=False))


def _found(key: str, status: os.stat_result) -> Found:
    return Found(key=key, size_bytes=status.st_size, modified_s=status.st_mtime)


def _settle(file: Path) -> None:
    file.chmod(stat.S_IMODE(file.stat().st_mode) & ~0o222)
    sync(file)


def _link_new(private: Path, target: Path) -> bool:
    """Make a file visible as `target`, read-only, in one step; False if the name is taken.

    `private` stays. Where the file system has no hard links, a reader may see a part for a moment.
    """
    _settle(private)
    try:
        _with_folder(target, lambda: os.link(private, target))
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            write_new(target, private.read_bytes())
        except FileExistsError:
            return False
        sync(target)
    sync(target.parent)
    return True


def _replace_file(private: Path, target: Path) -> None:
    _settle(private)
    _with_folder(target, lambda: private.replace(target))
    sync(target.parent)


def _with_folder(target: Path, place: Callable[[], object]) -> None:
    """Put something below a folder that is made for it, or again if a clean-up just took it."""
    for _ in range(_TRIES):
        make_folders(target.parent)
        with contextlib.suppress(FileNotFoundError):
            place()
            return
    make_folders(target.parent)
    place()


KIND = FolderRegistry
