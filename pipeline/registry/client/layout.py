"""The folder that a pull leaves, and that a runtime mounts.

    DIR/manifest.json
    DIR/engine/...               what `vllm serve DIR/engine` or `trtllm-serve DIR/engine` reads
    DIR/engine/model.sig         OpenSSF model signature, where other people's verifiers look
    DIR/statements/<name>/...    signatures and verdicts, to verify the folder without the registry
    DIR/pull.json                what was pulled, from where, and what was believed

The last three are not part of the package: its digest does not cover them, and `verify_layout`
allows them and nothing else. Files are copies, never hard links: another name could change them.
Where the file system can share blocks between copies (Btrfs, XFS), the copy from the cache takes no
space.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.core.errors import ConflictError, CorruptError, Fault, RecipeError, UntrustedError
from pipeline.core.values import FileDigest, Package
from pipeline.registry.client.select import Candidate
from pipeline.registry.disk import open_regular, read_bounded, settle
from pipeline.registry.manifest import ENGINE, MANIFEST, digest_bytes, read_manifest
from pipeline.registry.package import verify
from pipeline.registry.signing.model_signature import (
    MAX_SIGNATURE_BYTES,
    MODEL_SIGNATURE,
    available,
    believed_engine_signature,
)
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.statements import read_statements

STATEMENTS = "statements"
RECEIPT = "pull.json"
SIGNATURE = f"{ENGINE}/{MODEL_SIGNATURE}"
_COPY_BYTES = 64 << 20
_NO_COPY_RANGE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def verify_layout(folder: Path, *, deep: bool = True) -> Package:
    """Check that a folder is a whole package, with what a pull puts beside it and nothing else.

    Raises:
        CorruptError: Anything is missing, too much, or different; names it.
    """
    return verify(folder, deep=deep, beside=_is_beside)


def _is_beside(path: str) -> bool:
    """Whether a pull may have put this file or folder there."""
    parts = path.split("/")
    return path in {SIGNATURE, RECEIPT} or (parts[0] == STATEMENTS and len(parts) <= 3)


def require_free(to: Path) -> None:
    """Demand that a package can become `to` by one rename.

    Raises:
        ConflictError: Something is there.
        RecipeError: It is where a volume is mounted.
    """
    if to.is_symlink() or (to.exists() and not to.is_dir()):
        raise ConflictError(f"{to} is not a folder; remove it, or choose another with --to")
    if not to.is_dir():
        return
    if any(to.iterdir()):
        raise ConflictError(f"{to} holds something else; remove it, or choose another with --to")
    if to.is_mount():
        fault = f"{to} is a mount point, which no rename can replace; write --to {to / 'engine'}"
        raise RecipeError([Fault("--to", fault)])


def present(to: Path, digest: str) -> bool:
    """Whether `to` already is this package, every byte verified.

    Raises:
        CorruptError: It says to be, and is not.
    """
    if to.is_symlink() or not (to / MANIFEST).is_file():
        return False
    try:
        found = read_manifest(to / MANIFEST)[1]
    except CorruptError:
        return False
    return found == digest and verify_layout(to).digest == digest


def copy_package(
    files: Sequence[FileDigest], source: Path, target: Path, *, check: bool, jobs: int
) -> None:
    """Copy the files of a package.

    Args:
        files: Which.
        source: A whole package.
        target: Gets them.
        check: Verify what was copied; false where this process has just verified the source.
        jobs: Files at once.

    Raises:
        CorruptError: A file is not what the manifest says.
    """

    def copy(file: FileDigest) -> None:
        _copy_file(source / file.path, target / file.path)
        if not check:
            return
        with open_regular(target / file.path) as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != file.sha256:
            raise CorruptError(
                f"{source / file.path} has SHA-256 {found}, its manifest says {file.sha256}"
            )

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        list(pool.map(copy, files))


def _copy_file(source: Path, target: Path) -> None:
    """Copy by the kernel: it shares the blocks where it can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(source) as reader, target.open("xb") as writer:
        try:
            while os.copy_file_range(reader.fileno(), writer.fileno(), _COPY_BYTES):
                pass
        except OSError as error:
            if error.errno not in _NO_COPY_RANGE:
                raise
            shutil.copyfileobj(reader, writer, 1 << 20)


def copy_statements(source: Path, target: Path, *, replace: bool = False) -> None:
    """Copy statements with their times, which order verdicts.

    Args:
        source: `<name>/<file>`.
        target: Exists.
        replace: Bytes that are other ones there are replaced; else what is there stays.
    """
    for folder in sorted(source.iterdir()):
        goal = target / folder.name
        if goal.exists() and (not replace or _same_files(folder, goal)):
            continue
        private = target / f".{folder.name}-{os.getpid()}-{os.urandom(4).hex()}"
        try:
            shutil.copytree(folder, private)  # copies times, too
            settle(private)
            made_s = folder.stat().st_mtime
            os.utime(private, (made_s, made_s))
            shutil.rmtree(goal, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process has put the same there
                private.rename(goal)
        finally:
            shutil.rmtree(private, ignore_errors=True)


def _same_files(left: Path, right: Path) -> bool:
    def contents(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    try:
        return contents(left) == contents(right)
    except OSError:
        return False


def finish(folder: Path, candidate: Candidate, policy: TrustPolicy, receipt: bytes) -> None:
    """Add to the fetched files all else that a pull leaves, and force everything to the disk."""
    (folder / MANIFEST).write_bytes(candidate.data)
    if digest_bytes(candidate.data) != candidate.package.digest:
        raise CorruptError(f"the manifest of {candidate.what} changed in memory; pull again")
    (folder / STATEMENTS).mkdir(exist_ok=True)
    copy_statements(candidate.statements_dir, folder / STATEMENTS)
    listed = {file["path"] for file in candidate.package.manifest["files"]}
    signature = model_signature(candidate, policy)
    if signature is not None and SIGNATURE not in listed:
        (folder / SIGNATURE).write_bytes(signature)
    (folder / RECEIPT).write_bytes(receipt)
    settle(folder)


def model_signature(candidate: Candidate, policy: TrustPolicy) -> bytes | None:
    """The model signature by somebody who may sign; without the extra `sign`, the signer's own."""
    signer = candidate.verification.signer
    ours = f"model-{signer.key.keyid[:12]}" if signer else "model-"
    found = [
        (one.name, read_bounded(one.dir / MODEL_SIGNATURE, MAX_SIGNATURE_BYTES))
        for one in read_statements(candidate.statements_dir)
        if (one.dir / MODEL_SIGNATURE).is_file()
    ]
    for name, data in found:
        if name.startswith(ours) if not available() else _signed(data, candidate.package, policy):
            return data
    return None


def _signed(data: bytes, package: Package, policy: TrustPolicy) -> bool:
    """Whether somebody who may sign builds made this model signature."""
    with contextlib.suppress(UntrustedError):
        believed_engine_signature(data, package.manifest, policy, MODEL_SIGNATURE)
        return True
    return False


def check_model_signature(folder: Path, package: Package, policy: TrustPolicy) -> bool:
    """Check `engine/model.sig` of a folder; False if there is none, or nothing to check it with.

    Raises:
        UntrustedError: No key that may sign builds made it.
    """
    path = folder / SIGNATURE
    if not path.exists() or not available():
        return False
    if not _signed(read_bounded(path, MAX_SIGNATURE_BYTES), package, policy):
        raise UntrustedError(f"{path} is not a model signature by a key that may sign builds")
    return True
