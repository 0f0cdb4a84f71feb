"""The folder that a pull leaves, and that a runtime mounts.

    DIR/manifest.json
    DIR/engine/...               what `vllm serve DIR/engine` or `trtllm-serve DIR/engine` reads
    DIR/engine/model.sig         OpenSSF model signature, where other people's verifiers look
    DIR/statements/<name>/...    trusted statements, to verify the folder without the registry
    DIR/pull.json                what was pulled, from where, and what was believed

The last three are not part of the package: its digest does not cover them, and `verify_layout`
allows them and nothing else. Files are copies, never hard links: another name could change them.
Everything is read-only: `chmod -R u+w DIR` before you remove it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.core.errors import ConflictError, CorruptError, Fault, RecipeError
from pipeline.core.values import FileDigest, Package
from pipeline.core.workfolder import sync
from pipeline.registry.disk import make_folders, open_regular, writable_by_others
from pipeline.registry.manifest import ENGINE, MANIFEST, read_manifest, verify
from pipeline.registry.store import (
    ENVELOPE,
    RawStatement,
    is_attachment_name,
    is_statement_name,
)
from pipeline.registry.trust.statements import MODEL_SIGNATURE
from pipeline.registry.trust.verification import Resolved

STATEMENTS = "statements"
RECEIPT = "pull.json"
SIGNATURE = f"{ENGINE}/{MODEL_SIGNATURE}"
STATEMENTS_SUFFIX = ".statements"
"""`<version>.statements` lies beside the folder of a version in a folder registry."""
_COPY_JOBS = 4
_COPY_BYTES = 64 << 20
# What rename(2) says when the target is a folder with something in it, or not a folder.
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
_NO_COPY_RANGE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def verify_layout(folder: Path) -> Package:
    """Check that a folder is a whole package, with what a pull puts beside it and nothing else."""

    def beside(path: str) -> bool:
        parts = path.split("/")
        return path in {SIGNATURE, RECEIPT} or (parts[0] == STATEMENTS and len(parts) <= 3)

    return verify(folder, beside=beside)


def require_free(to: Path) -> None:
    """Demand that a package can become `to` by one rename; ConflictError if something is there."""
    if to.is_symlink() or (to.exists() and not to.is_dir()):
        raise ConflictError(f"{to} is not a folder; remove it, or choose another with --to")
    if not to.is_dir():
        return
    if any(to.iterdir()):
        raise ConflictError(f"{to} holds something else; remove it, or choose another with --to")
    if to.is_mount():
        fault = f"{to} is a mount point, which no rename can replace; write --to {to / 'engine'}"
        raise RecipeError([Fault("--to", fault)])


def is_pulled(to: Path, digest: str) -> bool:
    """Whether `to` already is this package, ours, every byte verified.

    CorruptError if it claims to be and is not, ConflictError if another user may change it.
    """
    if to.is_symlink() or not (to / MANIFEST).is_file():
        return False
    try:
        if read_manifest(to / MANIFEST)[1] != digest:
            return False
    except CorruptError:
        return False
    for path in (to, *to.rglob("*")):
        if reason := writable_by_others(path.lstat()):
            raise ConflictError(f"{path} {reason}; remove {to}, or choose another with --to")
    return verify_layout(to).digest == digest


def copy_files(files: Sequence[FileDigest], source: Path, target: Path) -> None:
    """Copy the files of a package that this process has just verified.

    By the kernel: it shares the blocks where it can.
    """

    def copy(file: FileDigest) -> None:
        (target / file.path).parent.mkdir(parents=True, exist_ok=True)
        with open_regular(source / file.path) as reader, (target / file.path).open("xb") as writer:
            try:
                while os.copy_file_range(reader.fileno(), writer.fileno(), _COPY_BYTES):
                    pass
            except OSError as error:
                if error.errno not in _NO_COPY_RANGE:
                    raise
                shutil.copyfileobj(reader, writer, 1 << 20)

    with ThreadPoolExecutor(max_workers=_COPY_JOBS) as pool:
        list(pool.map(copy, files))


def finish(
    folder: Path, resolved: Resolved, statements: Sequence[RawStatement], receipt: bytes
) -> None:
    """Add to the fetched files all else that a pull leaves; settled and read-only."""
    (folder / MANIFEST).write_bytes(resolved.data)
    (folder / STATEMENTS).mkdir()
    write_statements(folder / STATEMENTS, statements)
    listed = {file["path"] for file in resolved.package.manifest["files"]}
    for statement in statements:
        if (signature := statement.files.get(MODEL_SIGNATURE)) and SIGNATURE not in listed:
            (folder / SIGNATURE).write_bytes(signature)
            break
    (folder / RECEIPT).write_bytes(receipt)
    settle_read_only(folder)


def settle_read_only(folder: Path) -> None:
    """Make all in a folder read-only for everyone, and force it to the disk.

    The folder itself stays writable for its owner: a rename to another parent needs that.
    """
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            Path(root, name).chmod(0o444)
            sync(Path(root, name))
        sync(Path(root))
        Path(root).chmod(0o755 if Path(root) == folder else 0o555)


def move_into_place(private: Path, target: Path) -> bool:
    """Make a settled, non-empty folder visible as `target`, in one step, and read-only.

    By `rename(2)`: it never replaces a folder that has something in it, on any POSIX file system.
    False if `target` is taken; an empty folder there counts as free.
    """
    make_folders(target.parent)
    try:
        # Not Path.rename: its documentation leaves open what happens to an existing target.
        os.rename(private, target)  # noqa: PTH104
    except OSError as error:
        # ENOENT: a network file system repeated a request whose first answer was lost.
        if error.errno in _TAKEN or (error.errno == errno.ENOENT and target.is_dir()):
            return False
        raise
    target.chmod(0o555)
    sync(target.parent)
    return True


def write_statements(folder: Path, statements: Sequence[RawStatement]) -> None:
    """Write statements as `<name>/<file>`; one that is there stays: names follow from bytes."""
    for statement in statements:
        target = folder / statement.name
        if not is_statement_name(statement.name) or target.exists():
            continue
        private = folder / f".{statement.name}-{os.urandom(8).hex()}"
        private.mkdir(mode=0o755)
        try:
            for name, data in statement.files.items():
                if name == ENVELOPE or is_attachment_name(name):
                    (private / name).write_bytes(data)
            with contextlib.suppress(OSError):  # another process has put the same there
                private.rename(target)
        finally:
            shutil.rmtree(private, ignore_errors=True)
