"""Whether another user of this machine may replace a file.

Whoever may write a folder may rename what lies in it, so every folder above counts too, along the
path as it is written and along the one that its links lead to. A folder with the sticky bit, such
as `/tmp`, is fine above what is ours: there each user renames only what is theirs.
"""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

from pipeline.core.errors import AccessError


def require_unshared(path: Path) -> None:
    """Refuse a file or folder that a user other than root and ourselves may change or replace.

    Args:
        path: Exists.

    Raises:
        AccessError: Another user may; names the file or folder and the way out.
        OSError: It cannot be looked at.
    """
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - links are looked at one by one
    resolved = path.resolve(strict=True)
    for own in dict.fromkeys((absolute, resolved)):
        status = own.lstat()
        reason = "" if stat.S_ISLNK(status.st_mode) else writable_by_others(status)
        _refuse(own, reason, f"or use another folder than that of {path}")
        require_unshared_parent(own.parent, f"or use another folder than that of {path}")


def require_unshared_parent(folder: Path, way_out: str) -> None:
    """Refuse a folder in which another user may rename what is ours.

    Args:
        folder: Exists.
        way_out: What else the user can do; ends the message.

    Raises:
        AccessError: Another user may, there or in a folder above.
        OSError: It cannot be looked at.
    """
    for above in (folder, *folder.parents):
        status = above.lstat()
        reason = writable_by_others(status)
        sticky = status.st_mode & stat.S_ISVTX and reason.startswith("is writable")
        if not sticky and not stat.S_ISLNK(status.st_mode):
            _refuse(above, reason, way_out)


def require_private_parent(parent: Path, setting: str) -> None:
    """Demand that no other user can rename in `parent`, nor rename it or a folder above it.

    Args:
        parent: Exists.
        setting: What chooses another one.

    Raises:
        AccessError: Another user can; names the folder and the ways out.
    """
    require_unshared_parent(
        parent.resolve(),
        f"choose another folder with {setting}, or, if you trust everyone who can write there (a "
        "pod's own volume), add --allow-shared-parent",
    )


def writable_by_others(status: os.stat_result) -> str:
    """How another user may write to a file or into a folder; empty if none may.

    A group with the number of the user is the user's own, as useradd and umask 002 make it.
    """
    own = {0, os.geteuid()}
    if status.st_uid not in own:
        return f"belongs to {_user(status.st_uid)}"
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


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
