"""Reading a registry in a folder.

Below the root no link is followed, wherever one lies: who may add one could have others read, write
or remove elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import CorruptError, NotFoundError
from pipeline.registry.disk import CHUNK_BYTES, disk_errors, open_regular, read_bounded
from pipeline.registry.stores.tree import Found

MISSING = FileNotFoundError, NotADirectoryError  # the latter: a link, too, where a folder was
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, kw_only=True)
class FolderObjects:
    """`pipeline.registry.stores.tree.Objects`, in a folder."""

    path: Path

    @property
    def url(self) -> str:
        return str(self.path)

    def find(self, key: str) -> Found | None:
        with disk_errors(f"read {self.path / key}"):
            with contextlib.suppress(*MISSING), self._folder(key) as (folder, name):
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                return _found(key, status) if stat.S_ISREG(status.st_mode) else None
            return None

    def listed(self, prefix: str) -> Iterator[Found]:
        with disk_errors(f"read {self.path / prefix}"):
            if self._is_there(f"{prefix}."):
                yield from _walk(self.path / prefix, prefix)

    def read(self, key: str, limit_bytes: int) -> bytes | None:
        with disk_errors(f"read {self.path / key}"):
            for seen in (False, True):  # it may come after the first look
                try:
                    with self._folder(key) as (folder, _):
                        return read_bounded(self.path / key, limit_bytes, folder)
                except MISSING:
                    break
                except CorruptError:
                    if not self._is_there(key):
                        break
                    if seen:
                        raise
            return None

    @contextlib.contextmanager
    def stream(self, key: str, offset: int, end: int | None) -> Iterator[Iterator[bytes]]:
        path = self.path / key
        with disk_errors(f"read {path}"):
            try:
                with self._folder(key) as (folder, _):
                    stream = open_regular(path, folder)
            except (CorruptError, *MISSING):
                if self._is_there(key):
                    raise
                raise NotFoundError(f"{path} is missing") from None
            with stream:
                stream.seek(offset)
                yield iter(lambda: stream.read(CHUNK_BYTES), b"")

    @contextlib.contextmanager
    def _folder(self, key: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """The folder of a key, open, and the key's name in it; OSError if there is none."""
        *parts, name = key.split("/")
        folder = os.open(self.path, _FOLDER)
        try:
            for part in parts:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o775, dir_fd=folder)  # less what the umask takes
                        os.fsync(folder)
                inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
            yield folder, name
        finally:
            os.close(folder)

    def _is_there(self, key: str) -> bool:
        """Whether anything is there, a plain file or not."""
        with contextlib.suppress(*MISSING), self._folder(key) as (folder, name):
            os.stat(name, dir_fd=folder, follow_symlinks=False)
            return True
        return False


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
