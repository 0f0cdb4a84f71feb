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
    for leftover in sorted(area.iterdir()):
        remove_abandoned(leftover)
    while True:
        folder = Path(tempfile.mkdtemp(dir=area))
        with _locked(folder) as ours:
            if not ours:
                continue  # taken for abandoned before we had the lock
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def abandoned(area: Path) -> list[Path]:
    """What runs that are over left in `area`, sorted."""
    found = []
    for folder in sorted(area.iterdir()) if area.is_dir() else ():
        with _locked(folder) as ours:
            if ours:
                found.append(folder)
    return found


def remove_abandoned(folder: Path) -> None:
    """Remove a private folder, unless a process works in it."""
    with _locked(folder) as ours:
        if ours:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock for the block; False if another process has it, or it is gone."""
    with contextlib.ExitStack() as stack:
        ours = False
        with contextlib.suppress(OSError):
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(folder, flags)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = folder.exists()
        yield ours
