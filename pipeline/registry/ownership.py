"""Whether another user of this machine may replace a file: `require_unshared(path)`.

Whoever may write a folder may rename what lies in it, so every folder above counts too, along the
path as it is written and along the one that its links lead to.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pipeline.core.errors import AccessError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def require_unshared(path: Path) -> None:
    """Refuse a file or folder that a user other than root and ourselves may change or replace.

    A folder with the sticky bit, such as `/tmp`, is fine above what is ours.

    Args:
        path: Exists.

    Raises:
        AccessError: Another user may; names the file or folder and the way out.
        OSError: It cannot be looked at.
    """
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - links are looked at one by one
    resolved = path.resolve(strict=True)
    for place in dict.fromkeys((absolute, *absolute.parents, resolved, *resolved.parents)):
        status = place.lstat()
        if status.st_uid not in {0, os.geteuid()}:
            raise AccessError(
                f"{place} belongs to user {status.st_uid}, who may replace {path}; give it to "
                f"root or to yourself (chown), or use another folder"
            )
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        above = place not in {absolute, resolved}
        if stat.S_ISLNK(status.st_mode) or (sticky and above):
            continue
        if status.st_mode & _OTHERS_WRITE:
            raise AccessError(
                f"other users may write {place}, and so replace {path}; run chmod go-w {place}, "
                "or use another folder"
            )
