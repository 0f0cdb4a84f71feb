"""Seal a folder into a package, and verify one.

    package = seal(staging, engine, weights, label)
    package = verify(folder)                          # every byte, before anything is loaded

A package is `manifest.json` and the files that it names below `engine/`, and nothing else: an extra
file, a link or a FIFO is damage, since what is not listed is not checked.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from pipeline.core.cache import RECORD
from pipeline.core.errors import CorruptError
from pipeline.core.values import Engine, FileDigest, Package, Weights
from pipeline.registry.disk import disk_errors, file_fault, open_regular, write_new
from pipeline.registry.manifest import (
    ENGINE,
    MANIFEST,
    NOTICE,
    Label,
    digest_bytes,
    files_of,
    make_manifest,
    manifest_bytes,
    read_manifest,
)
from pipeline.registry.paths import folders_of

_CHUNK_BYTES = 1 << 20


def seal(staging_dir: Path, engine: Engine, weights: Weights, label: Label) -> Package:
    """Copy an engine folder into an empty folder and write its manifest, last.

    Each file is hashed from the bytes that are written. The stage cache's own record at the top of
    the engine folder stays behind: it holds times. So do empty folders. A notice that the licence
    asks for is added to the engine folder's `NOTICE`.

    Args:
        staging_dir: An empty folder; becomes the package.
        engine: What to package; its folder stays as it is.
        weights: What the engine was made from.
        label: Name, version and build.

    Raises:
        CorruptError: The engine folder is empty, or holds something that no package may: a link, a
            FIFO, a path that means another file elsewhere.
        RecipeError: Name, variant, version or card breaks the grammar of references.
        TransientError: The disk is full.
        AccessError: The staging folder is not writable.
    """
    with disk_errors(f"copy the engine to {staging_dir}"):
        files = [
            _copy(engine.dir / path, staging_dir / ENGINE / path, f"{ENGINE}/{path}")
            for path in sorted(_walk(engine.dir))
            if path != RECORD
        ]
        if not files:
            raise CorruptError(f"{engine.dir} has no files; run the same command again")
        if weights.licence.notice:
            files = _with_notice(files, staging_dir, weights.licence.notice)
        manifest = make_manifest(engine, weights, label, files)
        data = manifest_bytes(manifest)
        write_new(staging_dir / MANIFEST, data)
    return Package(dir=staging_dir, manifest=manifest, digest=digest_bytes(data))


def verify(
    package_dir: Path, *, deep: bool = True, beside: Callable[[str], bool] = lambda path: False
) -> Package:
    """Check that a folder is a whole, unchanged package.

    Args:
        package_dir: The folder.
        deep: Read every file and compare its SHA-256; otherwise only names and sizes are compared.
        beside: Whether a path may be there although no manifest lists it; such a file must be a
            plain one. A package in a registry has none.

    Raises:
        CorruptError: Anything is missing, too much, or different; names it.
    """
    with disk_errors(f"verify {package_dir}"):
        manifest, digest = read_manifest(package_dir / MANIFEST)
        wanted = {file.path: file for file in files_of(manifest)}
        folders = {folder for path in wanted for folder in folders_of(path)}
        found = _walk(package_dir, lambda path: path in folders or beside(path))
        for path, status in sorted(found.items()):
            if status.st_nlink != 1:
                raise CorruptError(
                    f"{package_dir}: {path!r} has {status.st_nlink} hard links, so another name "
                    "may change it; put a copy in its place"
                )
        found.pop(MANIFEST, None)
        if missing := wanted.keys() - found.keys():
            raise CorruptError(f"{package_dir}: {min(missing)!r} is missing")
        if extra := {path for path in found.keys() - wanted.keys() if not beside(path)}:
            raise CorruptError(f"{package_dir}: {min(extra)!r} is not in its manifest")
        for path, file in sorted(wanted.items()):
            if found[path].st_size != file.size_bytes:
                raise CorruptError(
                    f"{package_dir}: {path!r} has {found[path].st_size} bytes, "
                    f"its manifest says {file.size_bytes}"
                )
        if deep:
            for file in wanted.values():
                _check_bytes(package_dir, file)
    return Package(dir=package_dir, manifest=manifest, digest=digest)


def _walk(
    folder: Path, may_be_folder: Callable[[str], bool] = lambda path: True
) -> dict[str, os.stat_result]:
    """Every file below `folder`, by relative POSIX path; all but files and folders is damage.

    Args:
        folder: Where to look.
        may_be_folder: Whether a folder may be there.
    """
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise CorruptError(f"{folder} is not a folder")
    found: dict[str, os.stat_result] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                path = f"{prefix}{entry.name}"
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    if not may_be_folder(path):
                        raise CorruptError(f"{folder}: folder {path!r} is not in its manifest")
                    pending.append(f"{path}/")
                elif fault := file_fault(status.st_mode):
                    raise CorruptError(f"{folder}: {path!r} {fault}")
                else:
                    found[path] = status
    return found


def _copy(source: Path, target: Path, path: str) -> FileDigest:
    """Copy one file, hashing what is written."""
    digest = hashlib.sha256()
    size_bytes = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(source) as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            digest.update(chunk)
            writer.write(chunk)
            size_bytes += len(chunk)
    return FileDigest(path=path, size_bytes=size_bytes, sha256=digest.hexdigest())


def _with_notice(files: list[FileDigest], staging_dir: Path, notice: str) -> list[FileDigest]:
    """Append a notice to the package's `NOTICE`, whatever its case; made when there is none."""
    path = f"{ENGINE}/{NOTICE}"
    present = next((file.path for file in files if file.path.lower() == path.lower()), None)
    target = staging_dir / path
    text = notice.strip() + "\n"
    if present is not None:
        text = f"{(staging_dir / present).read_text('utf-8').rstrip()}\n\n{text}"
        (staging_dir / present).unlink()
    write_new(target, data := text.encode())
    added = FileDigest(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return [*(file for file in files if file.path != present), added]


def _check_bytes(package_dir: Path, file: FileDigest) -> None:
    """Compare a file's SHA-256."""
    with open_regular(package_dir / file.path) as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != file.sha256:
        raise CorruptError(
            f"{package_dir}: {file.path!r} has SHA-256 {found}, its manifest says {file.sha256}"
        )
