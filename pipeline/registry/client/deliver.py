"""Bring a chosen package to where it is wanted, straight or through the cache.

docs/deploy/README.md has what a pull leaves. What is not part of the package `verify_layout` allows
beside it, and nothing else. Files are copies, never hard links: another name could change them.

Nothing shows before all of it is there, verified and on the disk; then one rename shows it all.
What a broken pull leaves is a work folder beside the goal, from which the next one goes on.

The cache, `$ENGINESMITH_CACHE/packages`, is a registry in a folder, without an identity and
channels, so that one can pull from it where there is no network: one copy of a package for every
pull on this machine, read-only, and beside it the trusted statements. A package there is verified
whenever it is used; a damaged one is fetched again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.core.errors import ConflictError, CorruptError, Fault, RecipeError, TransientError
from pipeline.core.ownership import CACHE, make_own, open_to_others, require_unshared, sync
from pipeline.core.progress import BYTES, progress
from pipeline.core.published import FileDigest, Package
from pipeline.core.settings import cache_root
from pipeline.core.workfolder import WorkFolder, hold_lock, remove_folder, work_folder
from pipeline.registry.client.download import PACKAGE, download, require_room
from pipeline.registry.disk import disk_errors, open_regular
from pipeline.registry.manifest import ENGINE, MANIFEST, files_of, read_manifest, verify
from pipeline.registry.store import ENVELOPE, Place, RawStatement, Store
from pipeline.registry.trust.statements import MODEL_SIGNATURE, whole_statements
from pipeline.registry.trust.verification import Resolved

log = logging.getLogger(__name__)

Origin = Literal["registry", "cache", "present"]
"""`registry`: fetched now. `cache`: fetched before. `present`: it was at the goal already."""
_SETTING = "--to (if you trust everyone who may write there, add --allow-shared-parent)"
_NAME_CHARS = 40
"""Of the goal's name in that of a work folder, which must fit NAME_MAX (255)."""
STATEMENTS = "statements"
RECEIPT = "pull.json"
SIGNATURE = f"{ENGINE}/{MODEL_SIGNATURE}"
STATEMENTS_SUFFIX = ".statements"
"""`<version>.statements` lies beside the folder of a version in a folder registry."""
_STALLED_S = 20.0
"""How long other pullers watch one that receives nothing, before they try themselves."""
_LOCAL_JOBS = 2
_REMOTE_JOBS = min(8, 2 * (os.cpu_count() or 1))
"""A connection of a distant store is slow, so that several pay; but more threads than cores cost
time: 1 GB over loopback on 2 cores took 1.45 s with 4, 1.54 with 8 (measured on 2026-11-29)."""
_COPY_JOBS = 4
_COPY_BYTES = 64 << 20
# What rename(2) says when the target is a folder with something in it, or not a folder.
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
_NO_COPY_RANGE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def cache_dir() -> Path:
    """Where packages are kept on this machine."""
    return cache_root().absolute() / "packages"


def cache_entry(place: Place) -> Path:
    """Where a package is kept, or would be."""
    return cache_dir() / place.name / place.variant / place.version


@contextlib.contextmanager
def locked_cache(place: Place) -> Iterator[Callable[[], None]]:
    """Hold a version, so that one of many pullers downloads and the others take its entry.

    They wait as long as it calls what this gives.
    """
    with disk_errors(f"write {cache_dir()}", CACHE):
        make_own(cache_entry(place).parent, CACHE)
    path = cache_root() / "locks" / f"package-{place.version}.lock"
    with hold_lock(path, _STALLED_S):
        path.touch()
        yield path.touch


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """Where a package is, and what it took."""

    dir: Path
    origin: Origin
    fetched_bytes: int


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One package on its way; `jobs` chunks at once, None for what suits the store."""

    store: Store
    resolved: Resolved
    jobs: int | None = None
    shared_parent: bool = False

    @property
    def _digest(self) -> str:
        return self.resolved.package.digest

    def to_folder(
        self, to: Path, receipt: Callable[[Origin], bytes], *, through_cache: bool
    ) -> Delivered:
        """Fetch, verify, show at `to`, with `receipt(how it came)` as its `pull.json`.

        ConflictError if something else is there. If bytes are wrong nothing is left.
        """
        to = to.absolute()
        with disk_errors(f"write {to}", "--to"):
            try:
                require_free(to)
            except ConflictError:
                if not is_pulled(to, self._digest):
                    raise
                with contextlib.suppress(OSError), self._beside(to, keep=None):
                    pass  # what a run left that was killed after its last step is removed
                return Delivered(dir=to, origin="present", fetched_bytes=0)
            if self.shared_parent:
                to.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            else:
                require_unshared(to, _SETTING)
                make_own(to.parent, _SETTING, 0o755)
            if not through_cache and not cache_entry(self.resolved.place).is_dir():
                with self._beside(to, keep=_can_go_on) as work:
                    count = self._fetch(work)
                    came = Delivered(dir=work.dir, origin="registry", fetched_bytes=count)
                    return self._show(work, to, receipt, came)
            kept = self.to_cache()
            files = files_of(self.resolved.package.manifest)
            require_room(to.parent, sum(file.size_bytes for file in files))
            with self._beside(to, keep=None) as work:
                # The entry was verified a moment ago, and only we can write to it.
                copy_files(files, kept.dir, work.dir / PACKAGE)
                return self._show(work, to, receipt, kept)

    def to_cache(self) -> Delivered:
        folder, entry = cache_dir(), cache_entry(self.resolved.place)
        prefix, fetched = f".pull-{self._digest[:12]}-", 0
        with disk_errors(f"write {folder}", CACHE), locked_cache(self.resolved.place) as got_on:
            beside = entry.with_name(f"{entry.name}{STATEMENTS_SUFFIX}")
            beside.mkdir(mode=0o700, exist_ok=True)
            write_statements(beside, self._statements())
            if not self._is_kept(entry):
                with work_folder(folder, prefix, _can_go_on) as work:
                    fetched = self._fetch(work, got_on)
                    (work.dir / PACKAGE / MANIFEST).write_bytes(self.resolved.data)
                    settle_read_only(work.dir / PACKAGE)
                    move_into_place(work.dir / PACKAGE, entry)
            else:
                with work_folder(folder, prefix):
                    pass  # what a run left that was killed after its last step is removed
        origin: Origin = "registry" if fetched else "cache"
        return Delivered(dir=entry, origin=origin, fetched_bytes=fetched)

    def _is_kept(self, entry: Path) -> bool:
        """Whether the cache has the package, every byte verified; a damaged one is removed."""
        if not entry.is_dir():
            return False
        try:
            if verify(entry).digest == self._digest:
                return True
            raise CorruptError(f"{entry} holds another package than its name says")
        except CorruptError as error:
            log.warning("%s; fetching it again", error)
            remove_folder(entry)
            return False

    def _statements(self) -> list[RawStatement]:
        """The trusted statements; of their files only `model.sig`, which stock tools read."""
        found = {one.name: {ENVELOPE: one.envelope} for one in self.resolved.statements}
        wanted = [one for one in (self.resolved.model_signature,) if one]
        for one, files in whole_statements(wanted, self.store, self.resolved.place):
            found[one.name] |= files
        return [RawStatement(name=name, files=files) for name, files in found.items()]

    def _show(
        self, work: WorkFolder, to: Path, receipt: Callable[[Origin], bytes], came: Delivered
    ) -> Delivered:
        """Add to the fetched files all else that a pull leaves, and make them visible."""
        package, statements = work.dir / PACKAGE, self._statements()
        (package / MANIFEST).write_bytes(self.resolved.data)
        (package / STATEMENTS).mkdir()
        write_statements(package / STATEMENTS, statements)
        signed = [one for one in statements if MODEL_SIGNATURE in one.files]
        if signed and not (package / SIGNATURE).exists():
            (package / SIGNATURE).write_bytes(signed[0].files[MODEL_SIGNATURE])
        (package / RECEIPT).write_bytes(receipt(came.origin))
        settle_read_only(package)
        if move_into_place(package, to):
            return replace(came, dir=to)
        if is_pulled(to, self._digest):  # another process pulled the same
            return replace(came, dir=to, origin="present")
        raise ConflictError(f"{to} was filled by another process; choose another with --to")

    def _beside(
        self, to: Path, keep: Callable[[BaseException], bool] | None
    ) -> contextlib.AbstractContextManager[WorkFolder]:
        prefix = f".{to.name[:_NAME_CHARS]}.pulling-"
        return work_folder(to.parent, prefix, keep, setting=_SETTING, shared=self.shared_parent)

    def _fetch(self, work: WorkFolder, got_on: Callable[[], None] = lambda: None) -> int:
        files, place = files_of(self.resolved.package.manifest), self.resolved.place
        if work.adopted:
            _drop_foreign(work.dir / PACKAGE, {file.path for file in files})
        total = sum(file.size_bytes for file in files)
        with progress(f"Pulling {place}", total, BYTES) as show:

            def on_bytes(count: int) -> None:
                show(count)
                got_on()

            jobs = self.jobs or (_LOCAL_JOBS if self.store.local else _REMOTE_JOBS)
            return download(self.store, place, files, work, self._digest, jobs, on_bytes)


def _drop_foreign(package: Path, listed: set[str]) -> None:
    for path in sorted(package.rglob("*"), reverse=True):  # what is in a folder before it
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
        elif path.is_symlink() or path.relative_to(package).as_posix() not in listed:
            path.unlink()


def _can_go_on(error: BaseException) -> bool:
    """Whether what has landed is worth keeping: not after a full disk, nor after wrong bytes."""
    if isinstance(error, TransientError):
        return getattr(error.__cause__, "errno", None) not in {errno.ENOSPC, errno.EDQUOT}
    return isinstance(error, KeyboardInterrupt)


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
    if reason := open_to_others(to, above=False):
        raise ConflictError(f"{reason}; remove {to}, or choose another with --to")
    return verify_layout(to).digest == digest


def copy_files(files: Sequence[FileDigest], source: Path, target: Path) -> None:
    """Copy files that this process has just verified, by the kernel: it shares blocks if it can."""

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
    """Write verified statements as `<name>/<file>`; one that is there is the same."""
    for statement in statements:
        target = folder / statement.name
        if target.exists():
            continue
        private = folder / f".{statement.name}-{os.urandom(8).hex()}"
        private.mkdir(mode=0o755)
        try:
            for name, data in statement.files.items():
                (private / name).write_bytes(data)
            with contextlib.suppress(OSError):  # another process has put the same there
                private.rename(target)
        finally:
            shutil.rmtree(private, ignore_errors=True)
