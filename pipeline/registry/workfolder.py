"""Work folders: private to one process, and taken over by the next one if that process dies.

A work folder is made by us, with a random name and mode 0700, below a parent that no other user can
rename in. Its owner holds a lock (flock) on the folder itself. A dead process's folder is adopted
only if it is still ours, 0700 and no link, its owner ran under this kernel and its lock is free;
one whose owner we cannot see is removed after a day by the file system's own clock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import AccessError
from pipeline.registry.ownership import require_unshared_parent

_STALE_S = 24 * 3600.0
_YOUNG = "new-"
"""A folder that has no lock yet; it names the process that makes it."""
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, kw_only=True)
class WorkFolder:
    """A folder that no other process writes to.

    Attributes:
        dir: The folder.
        adopted: It was begun by a process that died.
    """

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
    setting: str,
    shared_parent: bool = False,
) -> Iterator[WorkFolder]:
    """A work folder in `parent`, removed after the block.

    Args:
        parent: Exists.
        prefix: Says what the folder is for.
        keep: Whether a later process can go on from where the block ended with this exception;
            then a dead process's folder is adopted, if there is one. None: always begin anew.
        setting: What chooses another parent, for messages.
        shared_parent: The user trusts who else may rename in `parent`.

    Raises:
        AccessError: Other users can rename in `parent`.
        OSError: `parent` is not writable.
    """
    if not shared_parent:
        require_private_parent(parent, setting)
    parent = parent.resolve()
    with contextlib.ExitStack() as locks:
        folder = _make(parent, prefix, locks)
        adopted = False
        for dead, ours in list(_dead(parent, prefix, folder, locks)):
            if ours and keep is not None and not adopted:
                dead, folder, adopted = folder, dead, True
            remove_folder(dead)
        try:
            yield WorkFolder(dir=folder, adopted=adopted)
        except BaseException as error:
            if keep is None or not keep(error):
                remove_folder(folder)
            raise
        remove_folder(folder)


def require_private_parent(parent: Path, setting: str) -> None:
    """Demand that no other user can rename in `parent`, nor rename it or a folder above it.

    Raises:
        AccessError: Another user can; names the folder and the ways out.
    """
    require_unshared_parent(
        parent.resolve(),
        f"choose another folder with {setting}, or, if you trust everyone who can write there (a "
        "pod's own volume), add --allow-shared-parent",
    )


def _make(parent: Path, prefix: str, locks: contextlib.ExitStack) -> Path:
    """A new folder, locked; it gets its name when it is, so that no process takes it for dead."""
    name = secrets.token_hex(8)
    young = parent / f"{prefix}{_YOUNG}{_namespace()}-{os.getpid()}-{name}"
    young.mkdir(mode=0o700)
    descriptor = _open_own(young)
    if descriptor is None:
        raise AccessError(f"{young} was replaced while it was made; another user can write there")
    locks.callback(os.close, descriptor)
    _lock(descriptor)
    try:
        return young.rename(parent / f"{prefix}{_boot()}-{name}")
    except OSError:
        remove_folder(young)
        raise


def _dead(
    parent: Path, prefix: str, ours: Path, locks: contextlib.ExitStack
) -> Iterator[tuple[Path, bool]]:
    """Folders of dead processes, and whether each is locked by us until the stack ends."""
    now_s = ours.stat().st_mtime  # by the clock that dates the others, too
    locking = _locks_work(ours)
    for folder in sorted(parent.iterdir()):
        if not folder.name.startswith(prefix) or folder == ours:
            continue
        descriptor = _open_own(folder)
        if descriptor is None:  # another user's, or gone
            continue
        locks.callback(os.close, descriptor)
        if _died_young(folder.name.removeprefix(prefix)):
            yield folder, False
            continue
        with contextlib.suppress(OSError):
            visible = locking and folder.name.removeprefix(prefix).startswith(f"{_boot()}-")
            if visible:
                # The path is looked at again: its owner may have removed it before we locked it.
                dead = _lock(descriptor) is True and _open_is(descriptor, folder)
            else:
                dead = now_s - os.fstat(descriptor).st_mtime > _STALE_S
            if dead:
                yield folder, visible


def _died_young(name: str) -> bool:
    """Whether a process that we can see made a folder of this name and ended before its lock."""
    namespace, _, rest = name.removeprefix(_YOUNG).partition("-")
    pid = rest.partition("-")[0]
    if not name.startswith(_YOUNG) or namespace != _namespace() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)  # asks only whether it exists
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _namespace() -> str:
    """Names the running kernel's PID namespace: in another one the same id is another process."""
    try:
        return f"{_boot()}.{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux
        return f"{_boot()}.0"


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


def _open_is(descriptor: int, folder: Path) -> bool:
    """Whether a path still leads to an open folder."""
    return os.path.samestat(os.fstat(descriptor), folder.lstat())


def _lock(descriptor: int) -> bool | None:
    """Take the lock: whether it was free; None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}:
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


def remove_folder(folder: Path) -> None:
    """Remove a folder of ours, read-only folders in it included."""
    for root, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            Path(root).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _boot() -> str:
    """Names the running kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:  # not Linux
        return "".join(char for char in os.uname().nodename if char.isalnum())[:16] or "here"
