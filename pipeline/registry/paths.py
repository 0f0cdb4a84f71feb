"""Which file paths a package may hold.

A path is relative, POSIX, in Unicode NFC, and means the same file on every file system: no two
paths differ only in case, and none climbs out of the package. The rules hold for what we write and
for what we read.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from pipeline.registry.reference import is_device_name

_MAX_COMPONENT_BYTES = 255
"""NAME_MAX of ext4, XFS, Btrfs, APFS and NTFS."""
_FORBIDDEN = frozenset('\\:*?"<>|')
"""What a file name may not have on Windows, besides control characters and slashes; a colon opens
an alternate stream there (Microsoft, "Naming Files, Paths, and Namespaces")."""
_MAX_PATH_BYTES = 1024
"""Leaves three quarters of Linux's PATH_MAX (4096) to where a package is unpacked; also the longest
S3 key."""


def path_fault(path: str) -> str:
    """What is wrong with one path; empty if nothing is."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if not path:
        return "is empty"
    if not path.isprintable():
        return "has a control or unprintable character"
    if found := _FORBIDDEN.intersection(path):
        return f"has the character {min(found)!r}"
    if path.startswith("/"):
        return "is absolute"
    if unicodedata.normalize("NFC", path) != path:
        return "is not in Unicode normal form NFC"
    if len(encoded) > _MAX_PATH_BYTES:
        return f"is longer than {_MAX_PATH_BYTES} bytes"
    for component in path.split("/"):
        if component in {"", ".", ".."}:
            return f"has the component {component!r}"
        if component[-1] in ". " or is_device_name(component):
            return f"has the component {component!r}, which Windows takes for another file"
        if len(component.encode()) > _MAX_COMPONENT_BYTES:
            return f"has a component longer than {_MAX_COMPONENT_BYTES} bytes"
    return ""


def paths_fault(paths: Iterable[str]) -> str:
    """What is wrong with a set of paths, each named in the answer; empty if nothing is.

    Besides each path alone: duplicates, a file that is also a folder, and names that some file
    systems take for one (case, Unicode).
    """
    spelling: dict[str, str] = {}  # what a case-insensitive file system sees -> how it is written
    files: set[str] = set()
    folders: set[str] = set()
    for path in paths:
        if fault := path_fault(path):
            return f"{path!r} {fault}"
        if path in files:
            return f"{path!r} is there twice"
        files.add(path)
        folders.update(folders_of(path))
    for path in (*files, *folders):
        key = unicodedata.normalize("NFC", path.casefold())
        if spelling.setdefault(key, path) != path:
            return f"{path!r} and {spelling[key]!r} are one file on some systems"
    if both := files & folders:
        return f"{min(both)!r} is both a file and a folder"
    return ""


def folders_of(path: str) -> list[str]:
    """The folders that lead to a file: `a/b/c` -> `a`, `a/b`."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]
