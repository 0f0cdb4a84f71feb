"""What the registry asks of a file system, made safe and explained."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.errors import AccessError, CorruptError, PipelineError, TransientError

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
