"""Puts a set of files where it belongs: all of them or none, and nothing is overwritten."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from pathlib import Path

from pipeline.core.errors import ConflictError


def place(texts: Mapping[Path, str], folder: Path) -> None:
    """Write files below `folder` in order; if anything stops that, what was made is removed.

    The last one counts: without it the others mean nothing. It appears whole and last, so that even
    a kill leaves no half-written recipe, at worst its shape and sizes.

    Args:
        texts: Path below `folder` -> content.
        folder: Where they go; made when it is missing.

    Raises:
        ConflictError: One of them exists; it is left as it is.
        OSError: The disk is full, or may not be written.
    """
    made: list[Path] = []
    *others, last = texts
    try:
        for path in others:
            _make_folders((folder / path).parent, made)
            _write(folder / path, texts[path], made)
        _make_folders(folder, made)
        partial = folder / f"{last}.{os.urandom(4).hex()}.partial"
        _write(partial, texts[last], made)
        _rename_new(partial, folder / last)
    except BaseException as error:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        if isinstance(error, FileExistsError):
            where = error.filename2 or error.filename
            raise ConflictError(
                f"{where} exists, and is not overwritten; nothing was written"
            ) from (error)
        raise


def _make_folders(folder: Path, made: list[Path]) -> None:
    for path in reversed([folder, *folder.parents]):
        if not path.is_dir():
            path.mkdir()
            made.append(path)


def _write(path: Path, text: str, made: list[Path]) -> None:
    with path.open("x", encoding="utf-8") as stream:
        made.append(path)
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _rename_new(path: Path, target: Path) -> None:
    """Give a file its name unless that is taken; a link cannot overwrite, a rename would."""
    try:
        os.link(path, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if target.exists():
            raise FileExistsError(errno.EEXIST, "exists", str(target)) from None
        path.rename(target)
    else:
        path.unlink()
