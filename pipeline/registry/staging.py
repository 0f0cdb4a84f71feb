"""Private folders on the registry's own file system, where packages take shape.

Who works in one holds a lock on it, which the kernel takes away when the process ends. What a
killed run left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.registry.disk import make_folders


@contextlib.contextmanager
def private_folder(area: Path) -> Iterator[Path]:
    """A new folder in `area` that no other process uses; gone after the block, also on Ctrl-C."""
    make_folders(area)
    _sweep(area)
    while True:
        folder = Path(tempfile.mkdtemp(dir=area))
        with contextlib.ExitStack() as stack:
            if not _lock(folder, stack):
                continue  # taken for abandoned before we had the lock
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def _sweep(area: Path) -> None:
    """Remove what runs that are over left in `area`.

    Each goes while we hold its lock: one that was just made, and is not locked yet, is then not
    taken by its maker.
    """
    for folder in sorted(area.iterdir()):
        with contextlib.ExitStack() as stack:
            if _lock(folder, stack):
                shutil.rmtree(folder, ignore_errors=True)


def abandoned(area: Path) -> list[Path]:
    """What runs that are over left in `area`, sorted."""
    found = []
    for folder in sorted(area.iterdir()) if area.is_dir() else ():
        with contextlib.ExitStack() as stack:
            if _lock(folder, stack):
                found.append(folder)
    return found


def _lock(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Lock a folder until the stack ends; False if another process has it, or it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return folder.exists()
    except OSError:
        return False
