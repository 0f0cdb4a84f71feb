"""What no other user of the machine can change, or replace: ask first, then read or write there.

Who may write a folder may rename what lies in it, so all folders and links that lead to a path
count. One with the sticky bit, such as `/tmp`, is fine: there users rename only what is theirs.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.errors import AccessError

CACHE = "ENGINESMITH_CACHE"
"""Environment variable that chooses the folder of the cache."""
REGISTRY = "registry.path= or --registry"


def require_unshared(path: Path, setting: str, *, team: bool = False) -> None:
    """Refuse, by an AccessError, a path that another user (but root) may change or replace.

    `setting` chooses another one. What a `team` shares may belong to another user or be open to a
    group, but neither be open to everyone nor lie where everyone could have put it.
    """
    for one, reason in _replaceable(path):
        modes = one.parent.stat().st_mode | (0 if one.is_symlink() else one.lstat().st_mode)
        if modes & stat.S_IWOTH or not team:
            way_out = f"chown it, chmod go-w {one}, or choose another with {setting}"
            raise AccessError(f"{one} {reason}, so others could replace what you use: {way_out}")


def open_to_others(folder: Path, *, above: bool = True) -> str:
    """What another user may change in a folder, or in one `above` it; empty if nothing."""
    inside = ((one, writable_by_others(one.lstat())) for one in (folder, *folder.rglob("*")))
    found = [*inside, *(_replaceable(folder) if above else ())]
    return next((f"{one} {reason}" for one, reason in found if reason), "")


def _replaceable(path: Path) -> Iterator[tuple[Path, str]]:
    """What on the way to a path another user may change or replace, and how."""
    for one in _leading_to(path.absolute()):
        status = one.lstat()
        reason = writable_by_others(status)
        if reason and not (status.st_mode & stat.S_ISVTX and reason.startswith("is writable")):
            yield one, reason


def _leading_to(path: Path) -> Iterator[Path]:
    """A path, the folders above it, and those that lead to where links among them point."""
    for one in (path, *path.parents):
        if one.is_symlink() and one.exists():  # a circle of links does not
            yield from _leading_to(one.parent.resolve() / one.readlink())
        if os.path.lexists(one):
            yield one


def writable_by_others(status: os.stat_result) -> str:
    """How another user may write to a file or into a folder; empty if none may.

    A group with the number of the user is the user's own, as useradd and umask 002 make it.
    """
    own = {0, os.geteuid()}
    if status.st_uid not in own:
        return f"belongs to user {status.st_uid}"
    if stat.S_ISLNK(status.st_mode):  # its mode means nothing
        return ""
    if status.st_mode & stat.S_IWOTH:
        return "is writable by everyone"
    if status.st_mode & stat.S_IWGRP and status.st_gid not in own:
        return f"is writable by group {status.st_gid}"
    return ""


def make_own(folder: Path, setting: str, mode: int = 0o700, *, team: bool = False) -> None:
    """Make a folder and those above it that are missing, where `require_unshared` lets us."""
    require_unshared(folder, setting, team=team)
    for missing in reversed([one for one in (folder, *folder.parents) if not one.is_dir()]):
        missing.mkdir(mode, exist_ok=True)  # less what the umask takes
        sync(missing.parent)


def sync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
