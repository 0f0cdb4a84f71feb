"""Private folders on the registry's own file system, where packages take shape.

A folder's name says who works in it: `<machine>-<pid>-<random>`. What a killed run left behind is
removed by the next run: at once if its process is known to be gone, else after a day, by the clock
of the file system: machines that share it may disagree about the time.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.registry.disk import file_system_now_s

_LEFTOVER_AGE_S = 24 * 3600.0
"""Longer than any packaging: filling a folder takes minutes."""


@contextlib.contextmanager
def private_folder(area: Path) -> Iterator[Path]:
    """A new folder in `area` that nobody else uses; gone after the block, unless it was moved.

    It is removed on any exception, Ctrl-C included.
    """
    area.mkdir(parents=True, exist_ok=True)
    for leftover in abandoned(area, math.inf, file_system_now_s(area)):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = area / f"{_machine()}-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def abandoned(area: Path, newest_s: float, now_s: float) -> list[Path]:
    """What is left in `area` by runs that are over, sorted.

    Of another machine's run nobody here can know; after a day it counts as over.

    Args:
        area: Where private folders lie.
        newest_s: Unix time; what changed later is left out.
        now_s: Unix time by the file system's clock.
    """
    if not area.is_dir():
        return []
    found = []
    for folder in sorted(area.iterdir()):
        with contextlib.suppress(OSError):
            if _abandoned(folder, now_s) and folder.stat().st_mtime <= newest_s:
                found.append(folder)
    return found


def _abandoned(folder: Path, now_s: float) -> bool:
    machine, _, rest = folder.name.partition("-")
    pid = rest.partition("-")[0]
    if machine == _machine() and pid.isdecimal():
        return not _alive(int(pid))
    return now_s - folder.stat().st_mtime > _LEFTOVER_AGE_S


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # the latter: no system has such an id
        return False
    except PermissionError:
        return True
    return True


def _machine() -> str:
    """Names the set of processes whose ids we can see: this boot and this PID namespace.

    A host name would not do: containers may share it and yet not see each other's processes.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        seen = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        seen = os.uname().nodename
    return hashlib.sha256(seen.encode()).hexdigest()[:12]
