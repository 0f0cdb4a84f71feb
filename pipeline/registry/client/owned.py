"""Private folders of a process that may be killed, for the next process to go on from.

A folder's name says whose it is: `<prefix><boot>-<PID namespace>-<pid>-<random>`; its owner holds a
lock on the file `owner` in it. Nobody ever writes into a folder of somebody alive: a successor
first makes a dead one's folder its own by renaming it, which only one of many can.

Dead means: the lock is free, where locks work and the owner ran under the same kernel (so a
restarted container finds the folder of the one before); else, its process is gone, where we would
see it; else, nothing was written for a day, and then the folder is only removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_LOCK = "owner"
_YOUNG = ".new"
_LEFTOVER_AGE_S = 24 * 3600.0
"""As in pipeline.registry.staging; the lock file is touched with every piece."""


@dataclass(frozen=True, kw_only=True)
class Owned:
    """A folder that nobody else writes to.

    Attributes:
        dir: The folder.
        adopted: Somebody who died began to fill it.
    """

    dir: Path
    adopted: bool

    def touch(self) -> None:
        """Tell other machines that the owner lives."""
        with contextlib.suppress(OSError):
            os.utime(self.dir / _LOCK)


@contextlib.contextmanager
def owned_folder(
    parent: Path, prefix: str, keep: Callable[[BaseException], bool] | None = None
) -> Iterator[Owned]:
    """A folder of our own in `parent`, gone after the block; dead processes' ones go first.

    Args:
        parent: Exists.
        prefix: Says what the folder is for.
        keep: Whether the next process can go on from where the block ended with this exception;
            then a dead process's folder is adopted, if there is one. None: begin anew always.

    Raises:
        OSError: `parent` is not writable.
    """
    held: list[int] = []
    kept = False
    folders: list[Path] = []  # ours, the one that is used last
    try:
        folders.append(_make(parent, prefix, held))
        works = _locks_work(folders[0], held[0])
        found = _adopt(parent, prefix, held, locks_work=works, wanted=keep is not None)
        if found is not None:
            shutil.rmtree(folders.pop(), ignore_errors=True)
            folders.append(found)
        yield Owned(dir=folders[-1], adopted=found is not None)
    except BaseException as error:
        kept = keep is not None and keep(error)
        raise
    finally:
        for folder in folders if not kept else ():
            shutil.rmtree(folder, ignore_errors=True)
        for descriptor in held:
            os.close(descriptor)


def remove_stale(parent: Path, prefix: str) -> None:
    """Remove private folders that nobody touched for a day and nobody went on from."""
    for folder in parent.glob(f"{_escaped(prefix)}*"):
        if _stale(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _make(parent: Path, prefix: str, held: list[int]) -> Path:
    """A new folder; it gets its name when its lock is held."""
    name = _own_name(prefix)
    young = parent / f"{name}{_YOUNG}"
    young.mkdir(mode=0o700)
    try:
        descriptor = os.open(young / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        held.append(descriptor)
        _try_lock(descriptor)
        return young.rename(parent / name)
    except OSError:
        shutil.rmtree(young, ignore_errors=True)
        raise


def _locks_work(folder: Path, held: int) -> bool:
    """Whether a lock excludes another one: some network file systems grant every wish."""
    second = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    try:
        return _try_lock(held) and not _try_lock(second)
    finally:
        os.close(second)


def _adopt(
    parent: Path, prefix: str, held: list[int], *, locks_work: bool, wanted: bool
) -> Path | None:
    """Make a dead process's folder ours if one is wanted, the fullest; remove the others."""
    adopted: Path | None = None
    for folder in sorted(parent.glob(f"{_escaped(prefix)}*"), key=_blocks, reverse=True):
        with contextlib.ExitStack() as stack:
            lock = _lock_of_dead(folder, folder.name.removeprefix(prefix), locks_work, stack)
            if lock is None:
                continue
            useless = not _complete(folder) or _stale(folder)
            taken = parent / _own_name(prefix)
            try:
                folder.rename(taken)  # of several who see it dead, one succeeds
            except OSError:
                continue
            if wanted and adopted is None and not useless:
                held.append(os.dup(lock))  # the same lock, which the stack does not end
                adopted = taken
            else:
                shutil.rmtree(taken, ignore_errors=True)
    return adopted


def _lock_of_dead(
    folder: Path, owner: str, locks_work: bool, stack: contextlib.ExitStack
) -> int | None:
    """The lock of a folder whose owner is dead, open until the stack ends; None if it may live.

    One that has not got its name yet, or is being removed, may have an owner without a lock.
    """
    boot, _, rest = owner.partition("-")
    space, _, rest = rest.partition("-")
    complete = _complete(folder)
    try:
        path = folder / _LOCK if complete else Path(os.devnull)
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, lock)
        if boot == _boot() and locks_work and complete:
            dead = _try_lock(lock)
        elif boot == _boot() and space == _pid_space():
            dead = not _alive(rest.partition("-")[0])
        else:
            dead = _stale(folder)
    except OSError:  # somebody else's, or just removed
        return None
    return lock if dead else None


def _complete(folder: Path) -> bool:
    """Whether it has its name and its lock: it does not while it is made, and while it goes."""
    return folder.suffix != _YOUNG and (folder / _LOCK).exists()


def _stale(folder: Path) -> bool:
    try:
        paths = [path for path in (folder / _LOCK, folder) if path.exists()]
        return all(time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S for path in paths)
    except OSError:
        return False


def _blocks(folder: Path) -> int:
    """Disk that a folder's files use; a guess is enough."""
    try:
        return sum(path.lstat().st_blocks for path in folder.rglob("*"))
    except OSError:
        return 0


def _try_lock(descriptor: int) -> bool:
    """Whether we hold the lock now; False where there are no locks at all."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EWOULDBLOCK, errno.EACCES, errno.ENOLCK, *_UNSUPPORTED}:
            return False
        raise
    return True


_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def _own_name(prefix: str) -> str:
    return f"{prefix}{_boot()}-{_pid_space()}-{os.getpid()}-{os.urandom(4).hex()}"


def _boot() -> str:
    """Names the running kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:  # not Linux
        return "".join(char for char in os.uname().nodename if char.isalnum())[:16] or "here"


def _pid_space() -> str:
    """Names the set of processes whose ids we can see."""
    try:
        return "".join(filter(str.isdigit, str(Path("/proc/self/ns/pid").readlink())))
    except OSError:
        return "0"


def _alive(pid: str) -> bool:
    if not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _escaped(prefix: str) -> str:
    """For glob."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in prefix)
