"""The weight cache: finished Hugging Face folders, each with a record of its files' digests.

    <cache>/weights/hub/<owner>--<name>/<commit>/         made visible by one rename
        weights.json                                      origin, commit, SHA-256 of every file
        files/                                            what `Weights.dir` names

A finished folder is taken by sizes, record and safetensors headers: milliseconds, no network. Its
bytes were compared with their digests when they arrived.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.core.data import cache_root
from pipeline.core.errors import AccessError, CorruptError, TransientError
from pipeline.core.values import FileDigest
from pipeline.sources.files import check_weights

log = logging.getLogger(__name__)

RECORD = "weights.json"
FILES = "files"

_SCHEMA = 1
"""Raise it when other files are needed: finished folders of the old kind are then completed."""


def weights_root() -> Path:
    """Folder of the weight cache."""
    return cache_root() / "weights"


def lock_path(name: str) -> Path:
    """Lock that the makers of one cache entry wait for."""
    return cache_root() / "locks" / f"weights-{name}.lock"


def write_record(
    folder: Path, *, origin: str, commit: str | None, files: Sequence[FileDigest]
) -> None:
    """Write the record of `folder`, the last thing before the folder becomes visible."""
    record = {
        "schema": _SCHEMA,
        "origin": origin,
        "commit": commit,
        "files": [file.to_json() for file in files],
    }
    with (folder / RECORD).open("w") as stream:
        json.dump(record, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def finished_files(folder: Path) -> tuple[FileDigest, ...] | None:
    """The recorded digests of a finished folder; None when it is absent or damaged."""
    if not folder.is_dir():
        return None
    try:
        record = json.loads((folder / RECORD).read_text())
        files = tuple(FileDigest.from_json(file) for file in record["files"])
        present = {path.name: path.stat().st_size for path in (folder / FILES).iterdir()}
        if record["schema"] != _SCHEMA or present != {file.path: file.size_bytes for file in files}:
            raise ValueError("its files are not those of its record")
        check_weights(folder / FILES, [path for path in present if path.endswith(".safetensors")])
    except (CorruptError, FileNotFoundError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s); making it again", folder, error)
        return None
    return files


@contextlib.contextmanager
def disk_faults_explained() -> Iterator[None]:
    """Turn what a disk can do to a writer into errors with a next step.

    Raises:
        TransientError: The disk or the quota is full.
        AccessError: No permission to read or write.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or cache_root()
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise disk_full(f"no space left while writing {where}") from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise AccessError(
                f"{where}: {error.strerror}; grant access to it, or set ENGINESMITH_CACHE to a "
                "folder that you can write"
            ) from error
        raise


def disk_full(fault: str) -> TransientError:
    """The error of a full disk, whether met or foreseen."""
    return TransientError(
        f"disk full: {fault}; free some, or set ENGINESMITH_CACHE to a folder on a larger disk, "
        "and run the same command again"
    )
