"""Locks, and work folders: private to one process, and taken over by the next if that one dies.

A work folder has a random name and mode 0700. Its owner holds a lock (flock) on the folder itself,
which the kernel gives back when the process ends. A dead process's folder is adopted or removed
only if it is still ours, 0700 and no link, its owner ran under this kernel and its lock is free;
one whose owner we cannot see is removed after a day by the file system's own clock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import AccessError
from pipeline.core.ownership import CACHE, make_own, require_unshared

log = logging.getLogger(__name__)

_STALE_S = 24 * 3600.0
_TRIES = 100
_LOOK_S = 0.1
_YOUNG = "new-"
"""A folder that has no lock yet: it is empty, so none is adopted."""
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}


@contextlib.contextmanager
def hold_lock(path: Path, stalled_s: float = math.inf) -> Iterator[None]:
    """Hold an advisory lock in the cache (made when missing); says so when it has to wait.

    Goes on without it when its holder has not touched the file for `stalled_s`.
    """
    make_own(path.parent, CACHE)
    # To read and write, so that a FIFO that was put there does not hold us.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        waited_s, seen_ns = 0.0, 0
        while _lock(stream.fileno()) is False and waited_s < stalled_s:
            if not seen_ns:
                log.info("Another run is making %s; waiting for it", path.stem)
            if seen_ns != (seen_ns := os.fstat(stream.fileno()).st_mtime_ns):
                waited_s = 0.0
            time.sleep(_LOOK_S)
            waited_s += _LOOK_S
        yield  # on a file system without locks, too: the first rename wins


@dataclass(frozen=True, kw_only=True)
class WorkFolder:
    """A folder that no other process writes to; `adopted`: begun by a process that died."""

    dir: Path
    adopted: bool

    def touch(self) -> None:
        """Show other machines that the owner lives."""
        with contextlib.suppress(OSError):
            os.utime(self.dir)


@contextlib.contextmanager
def work_folder(
    parent: Path,
    prefix: str,
    keep: Callable[[BaseException], bool] | None = None,
    *,
    setting: str = CACHE,
    shared: bool = False,
) -> Iterator[WorkFolder]:
    """A work folder in `parent`, where those may rename who `require_unshared` lets, or `shared`.

    It is removed after the block. `keep` says whether a later process can go on from where the
    block ended with this exception; then a dead process's folder is adopted, if there is one. None:
    always begin anew.
    """
    if not shared:
        require_unshared(parent, setting)
    parent = parent.resolve()
    with contextlib.ExitStack() as locks:
        folder = _make(parent, prefix, locks)
        adopted = False
        try:
            for dead, ours in list(_dead(parent, prefix, folder, locks)):
                if ours and keep is not None and not adopted:
                    dead, folder, adopted = folder, dead, True
                remove_folder(dead)
            yield WorkFolder(dir=folder, adopted=adopted)
        except BaseException as error:
            if keep is None or not keep(error):
                remove_folder(folder)
            raise
        remove_folder(folder)


def _make(parent: Path, prefix: str, locks: contextlib.ExitStack) -> Path:
    """A new folder, locked; another one if a process took it for dead before it was."""
    for _ in range(_TRIES):
        name = f"{_boot()}-{secrets.token_hex(8)}"
        young, folder = parent / f"{prefix}{_YOUNG}{name}", parent / f"{prefix}{name}"
        try:
            young.mkdir(mode=0o700)
            if (descriptor := _open_own(young)) is None:
                with contextlib.suppress(OSError):
                    young.rmdir()
                continue
            locks.callback(os.close, descriptor)
            if _lock(descriptor) is not False and _leads_to(young, descriptor):
                return young.rename(folder)
        except BaseException:  # Ctrl-C, too
            remove_folder(young)
            remove_folder(folder)
            raise
    raise AccessError(
        f"a folder that is made in {parent} is replaced at once; another user can write there, or "
        "its file system keeps no modes"
    )


def _dead(
    parent: Path, prefix: str, ours: Path, locks: contextlib.ExitStack
) -> Iterator[tuple[Path, bool]]:
    """Folders of dead processes, and whether each may be adopted."""
    now_s = ours.stat().st_mtime  # by the clock that dates the others, too
    locking = _locks_work(ours)
    for folder in sorted(parent.iterdir()):
        if not folder.name.startswith(prefix) or folder == ours:
            continue
        if (descriptor := _open_own(folder)) is None:  # another user's, or gone
            continue
        locks.callback(os.close, descriptor)
        with contextlib.suppress(OSError):
            name = folder.name.removeprefix(prefix)
            visible = locking and name.removeprefix(_YOUNG).startswith(f"{_boot()}-")
            if visible:
                # The path is looked at again: its owner may have removed it before we locked it.
                dead = _lock(descriptor) is True and _leads_to(folder, descriptor)
            else:
                dead = now_s - os.fstat(descriptor).st_mtime > _STALE_S
            if dead:
                yield folder, visible and not name.startswith(_YOUNG)


def _open_own(folder: Path) -> int | None:
    """A descriptor of a folder that is ours alone; None for any other, or a link."""
    try:
        descriptor = os.open(folder, _OPEN_FOLDER)
    except OSError:
        return None
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(descriptor)
        return None
    return descriptor


def _leads_to(folder: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open folder."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.lstat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool | None:
    """Take the lock: whether it was free; None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _locks_work(ours: Path) -> bool:
    """Whether a lock that we hold is refused to others: some file systems grant every wish."""
    second = os.open(ours, _OPEN_FOLDER)
    try:
        return _lock(second) is False
    finally:
        os.close(second)


def _boot() -> str:
    """Names the running kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:  # not Linux
        return "".join(char for char in os.uname().nodename if char.isalnum())[:16] or "here"


def remove_folder(folder: Path) -> None:
    """Remove a folder of ours, read-only folders in it included, or what lies in its place."""
    with contextlib.suppress(OSError):
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return folder.unlink()
        for _, _, _, descriptor in os.fwalk(folder):  # follows no link
            with contextlib.suppress(OSError):
                os.fchmod(descriptor, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
