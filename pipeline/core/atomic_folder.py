"""A folder that appears complete, by one rename, or not at all.

Work goes on in a private folder beside the target. Its mark is its name, this user as its owner,
mode 0700 and a lock that the kernel gives back when the process ends, however it ends: so the next
run that works in the same place removes what a killed one left there, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

PREFIX = ".enginesmith-work-"


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A private folder beside `target` that becomes `target` by one rename when the block ends.

    On any exception, Ctrl-C included, the private folder is removed. If `target` was filled
    meanwhile, it stays and the private folder is dropped.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep_abandoned(target.parent)
    private, lock = _locked_folder(target.parent)
    try:
        yield private
        _sync(private)
        private.chmod(0o755)
        try:
            private.rename(target)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
    finally:
        shutil.rmtree(private, ignore_errors=True)
        os.close(lock)


def sweep_abandoned(parent: Path) -> None:
    """Remove the private folders of processes that have ended.

    Where the file system has no locks nothing is removed.
    """
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            state = folder.lstat()
            if (
                not stat.S_ISDIR(state.st_mode)
                or stat.S_IMODE(state.st_mode) != stat.S_IRWXU
                or state.st_uid != os.getuid()
            ):
                continue
            lock = _lock(folder)
            try:
                shutil.rmtree(folder)
            finally:
                os.close(lock)
            log.info("Removed %s, left behind by a run that was killed", folder)


def _locked_folder(parent: Path) -> tuple[Path, int]:
    """A new private folder, and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            return folder, _lock(folder)
        except (BlockingIOError, FileNotFoundError):  # another run took it for abandoned: too early
            continue
        except OSError as error:
            log.debug("%s: the file system has no locks: %s", folder, error)
            return folder, os.open(folder, os.O_RDONLY | os.O_DIRECTORY)


def _lock(folder: Path) -> int:
    """Lock a folder; the descriptor that holds the lock.

    Raises:
        BlockingIOError: Another process holds it.
        FileNotFoundError: It was removed meanwhile.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.lstat()
    except OSError:
        os.close(lock)
        raise
    return lock


def _sync(folder: Path) -> None:
    """Force a folder's files to disk, so that the rename never shows files that a crash emptied."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or path == folder:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
