"""Writing to a registry in a folder.

A file becomes visible by one `link(2)` or `rename(2)` from `<root>/.staging`, whole and on the
disk. A package that is sealed below `.staging` is moved, not copied.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.core.errors import AccessError
from pipeline.core.ownership import REGISTRY, make_own, require_unshared, sync
from pipeline.core.published import FileDigest
from pipeline.core.workfolder import remove_folder, work_folder
from pipeline.registry.disk import disk_errors, write_new
from pipeline.registry.store import OnBytes
from pipeline.registry.stores.folder_reading import MISSING, FolderObjects
from pipeline.registry.stores.publication import checked_chunks

STAGING = ".staging"
_TRIES = 100


@dataclass(frozen=True, kw_only=True)
class WritableFolder(FolderObjects):
    """`WritableObjects` of `pipeline.registry.stores.publication`, in a folder."""

    def create(self, key: str, data: bytes) -> bool:
        with self._written(key) as new:
            write_new(new, data)
            _settle(new)
            return self._place(key, lambda folder, name: _link(new, folder, name))

    def replace(self, key: str, data: bytes) -> None:
        with self._written(key) as new:
            write_new(new, data)
            _settle(new)
            self._place(key, lambda folder, name: _replace(new, folder, name))

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
            _settle(new)
            self._place(key, lambda folder, name: _replace(new, folder, name))

    def delete(self, keys: Iterable[str]) -> None:
        """See the Protocol; folders that are empty then go, too."""
        for key in keys:
            with disk_errors(f"remove {self.path / key}"):
                with contextlib.suppress(*MISSING), self._folder(key) as (folder, name):
                    os.unlink(name, dir_fd=folder)
                with contextlib.suppress(OSError):  # not empty, or another process was faster
                    for parent in PurePosixPath(key).parents[:-1]:
                        with self._folder(str(parent)) as (folder, name):
                            os.rmdir(name, dir_fd=folder)

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
            usable = staging.is_dir() and not staging.is_symlink()
            for path in sorted(staging.iterdir()) if usable else ():
                with contextlib.suppress(FileNotFoundError):  # its owner has ended
                    status = path.lstat()
                    if status.st_mtime <= newest_s:
                        if delete and stat.S_ISDIR(status.st_mode):
                            remove_folder(path)
                        elif delete:
                            path.unlink()
                        yield f"{ascii(path.name)[1:-1]} in {STAGING} (left by a run)"

    def check_writable(self) -> None:
        with disk_errors(f"publish to {self.path}", "registry.path="):
            existing = self.path
            while not existing.exists() and existing != existing.parent:
                existing = existing.parent
            require_unshared(self.path, REGISTRY, team=True)
            if not existing.is_dir():
                fault = f"cannot publish to {self.path}: {existing} is not a folder"
                raise AccessError(f"{fault}; choose another with registry.path=")
            with tempfile.NamedTemporaryFile(prefix=".writable-", dir=existing) as stream:
                stream.write(b"\0")  # a full disk still makes empty files
                stream.flush()

    @contextlib.contextmanager
    def _written(self, key: str) -> Iterator[Path]:
        """Where to write what becomes `key`; on the same file system."""
        staging = self.path / STAGING
        with disk_errors(f"write {self.path / key}"):
            if staging.is_symlink():
                raise AccessError(f"{staging} is a link, and not ours; remove it")
            make_own(staging, REGISTRY, 0o775, team=True)
            with work_folder(staging, "write-", shared=True) as work:
                yield work.dir / "new"

    def _place(self, key: str, place: Callable[[int, str], bool]) -> bool:
        """Put a file into its folder, which is made, or again if a clean-up just took it."""
        for _ in range(_TRIES):
            with contextlib.suppress(FileNotFoundError):
                return self._place_once(key, place)
        return self._place_once(key, place)

    def _place_once(self, key: str, place: Callable[[int, str], bool]) -> bool:
        with self._folder(key, make=True) as (folder, name):
            done = place(folder, name)
            os.fsync(folder)
            return done


def _settle(file: Path) -> None:
    file.chmod(stat.S_IMODE(file.stat().st_mode) & ~0o222)
    sync(file)


def _link(new: Path, folder: int, name: str) -> bool:
    """Make a file visible under a name, in one step; False if the name is taken. `new` stays."""
    try:
        os.link(new, name, dst_dir_fd=folder)
    except FileExistsError:
        return False
    return True


def _replace(new: Path, folder: int, name: str) -> bool:
    try:
        os.replace(new, name, dst_dir_fd=folder)
    except IsADirectoryError:  # where we keep a file, a folder is another's rubbish
        shutil.rmtree(name, dir_fd=folder)
        os.replace(new, name, dst_dir_fd=folder)
    return True
