"""Puts a set of files where it belongs: all of them or none, and nothing is overwritten."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from pipeline.core.errors import ConflictError


def place(texts: Mapping[Path, str], folder: Path) -> None:
    """Write files below `folder` in order; if anything stops that, what was made is removed.

    Args:
        texts: Path below `folder` -> content; the last one makes the others count.
        folder: Where they go; made when it is missing.

    Raises:
        ConflictError: One of them exists; it is left as it is.
        OSError: The disk is full, or may not be written.
    """
    made: list[Path] = []
    try:
        for path in texts:
            target = folder / path
            for parent in reversed(target.parents):
                if not parent.is_dir():
                    parent.mkdir()
                    made.append(parent)
            with target.open("x", encoding="utf-8") as stream:
                made.append(target)
                stream.write(texts[path])
                stream.flush()
                os.fsync(stream.fileno())
    except BaseException as error:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        if isinstance(error, FileExistsError):
            message = f"{error.filename} exists, and is not overwritten; nothing was written"
            raise ConflictError(message) from error
        raise
