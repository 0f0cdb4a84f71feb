"""What the registry asks of a file system, made safe: exclusive, durable, explained, and ours.

A file is created exclusively by `link(2)`, which never replaces, on any POSIX file system; where
there are no hard links, by O_EXCL.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.errors import AccessError, CorruptError, PipelineError, TransientError
from pipeline.core.workfolder import sync

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_BUSY = {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR, errno.ESTALE}
CHUNK_BYTES = 256 << 10
"""1 GiB in writes of 256 KiB took 0.13, 0.17 and 0.33 s, of 1 MiB 0.10, 0.18 and 1.43 s, of 16 MiB
0.8 to 2.0 s (ext4, Linux 6.18, one run each, measured 2026-11-25; why is not known)."""


@contextlib.contextmanager
def disk_errors(doing: str, setting: str = "") -> Iterator[None]:
    """Turn an `OSError` of the block into a TransientError, AccessError or other PipelineError.

    `doing` is for the message, `publish to artifacts`; `setting` is what names another folder.
    """
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        fault = f"cannot {doing}: {error.strerror or error}{where}"
        if error.errno in _FULL | _BUSY:
            first = "free some space and " if error.errno in _FULL else ""
            raise TransientError(f"{fault}; {first}run the same command again") from error
        if error.errno in _FORBIDDEN:
            other = f"choose another folder{f' with {setting}' if setting else ''}"
            raise AccessError(f"{fault}; change its owner or mode, or {other}") from error
        raise PipelineError(f"{fault}; check the disk") from error


def file_fault(mode: int) -> str:
    """Why something with this `st_mode` is no plain file; empty if it is one."""
    if stat.S_ISLNK(mode):
        return "is a symbolic link"
    return "" if stat.S_ISREG(mode) else "is not a regular file"


def open_regular(path: Path, folder: int | None = None) -> io.BufferedReader:
    """Open a plain file for reading; never follows a link, never waits for a FIFO.

    `folder` is a descriptor of the one that it lies in. CorruptError if it is missing, or no plain
    file.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path if folder is None else path.name, flags, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptError(f"{path} is missing") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CorruptError(f"{path} is a symbolic link") from None
        raise
    stream = os.fdopen(descriptor, "rb")
    if fault := file_fault(os.fstat(descriptor).st_mode):
        stream.close()
        raise CorruptError(f"{path} {fault}")
    return stream


def read_bounded(path: Path, limit_bytes: int, folder: int | None = None) -> bytes:
    """Read a plain file; CorruptError, too, if it is longer than `limit_bytes`."""
    with open_regular(path, folder) as stream:
        data = stream.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise CorruptError(f"{path} is longer than {limit_bytes} bytes")
    return data


def write_new(path: Path, data: bytes) -> None:
    """Write a file that does not exist yet."""
    with path.open("xb") as stream:
        stream.write(data)


def make_folders(folder: Path) -> None:
    """Make `folder` and its parents, each of them durable; never writable by every user."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    for path in reversed(missing):
        path.mkdir(mode=0o775, exist_ok=True)  # less what the umask takes
        sync(path.parent)


def require_unshared(path: Path) -> None:
    """Refuse a file or folder that a user other than root and ourselves may change or replace.

    Who may write a folder may rename what lies in it, so every folder above counts too, along the
    path as it is written and along the one that its links lead to. A folder with the sticky
    bit, such as `/tmp`, is fine above what is ours: there each user renames only what is theirs.

    AccessError names the file or folder and the way out. `path` must exist.
    """
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - links are looked at one by one
    way_out = f"or use another folder than that of {path}"
    for own in dict.fromkeys((absolute, path.resolve(strict=True))):
        status = own.lstat()
        if not stat.S_ISLNK(status.st_mode):
            _refuse(own, writable_by_others(status), way_out)
        _require_unshared_parent(own.parent, way_out)


def require_private_parent(parent: Path, setting: str) -> None:
    """Refuse a folder that another user can rename in, or rename itself or a folder above it.

    AccessError names the folder and the ways out: `setting` chooses another one.
    """
    _require_unshared_parent(
        parent.resolve(),
        f"choose another folder with {setting}, or, if you trust everyone who can write there (a "
        "pod's own volume), add --allow-shared-parent",
    )


def _require_unshared_parent(folder: Path, way_out: str) -> None:
    for above in (folder, *folder.parents):
        status = above.lstat()
        reason = writable_by_others(status)
        sticky = status.st_mode & stat.S_ISVTX and reason.startswith("is writable")
        if not sticky and not stat.S_ISLNK(status.st_mode):
            _refuse(above, reason, way_out)


def writable_by_others(status: os.stat_result) -> str:
    """How another user may write to a file or into a folder; empty if none may.

    A group with the number of the user is the user's own, as useradd and umask 002 make it.
    """
    own = {0, os.geteuid()}
    if status.st_uid not in own:
        with contextlib.suppress(KeyError):
            return f"belongs to {pwd.getpwuid(status.st_uid).pw_name}"
        return f"belongs to user {status.st_uid}"
    if status.st_mode & stat.S_IWOTH:
        return "is writable by everyone"
    if status.st_mode & stat.S_IWGRP and status.st_gid not in own:
        return f"is writable by group {status.st_gid}"
    return ""


def _refuse(path: Path, reason: str, way_out: str) -> None:
    if reason:
        change = "chown it" if reason.startswith("belongs") else f"chmod go-w {path}"
        raise AccessError(
            f"{path} {reason}, so another user could replace what you use: {change}, {way_out}"
        )
