"""Bring a chosen package to where it is wanted: straight, or through the cache.

Nothing shows before all of it is there, verified and on the disk; then one rename shows it all.
What a broken pull leaves is a work folder beside the goal: the next pull goes on from it after a
lost connection, Ctrl-C or a kill. After a full disk or wrong bytes it is removed at once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.core.errors import ConflictError, CorruptError, NotFoundError, TransientError
from pipeline.core.progress import BYTES, progress
from pipeline.core.values import FileDigest, Package
from pipeline.registry.client.cache import SETTING, PackageCache
from pipeline.registry.client.download import PACKAGE, Record, Transfer, download
from pipeline.registry.client.layout import (
    copy_files,
    finish,
    is_pulled,
    move_into_place,
    require_free,
    settle_read_only,
)
from pipeline.registry.disk import disk_errors, make_folders
from pipeline.registry.manifest import MANIFEST, files_of
from pipeline.registry.package import verify
from pipeline.registry.resolve import Resolved
from pipeline.registry.store import ENVELOPE, RawStatement, Store
from pipeline.registry.trust.statements import verified_files
from pipeline.registry.workfolder import WorkFolder, remove_folder, work_folder

log = logging.getLogger(__name__)

Origin = Literal["registry", "cache", "present"]
"""`registry`: fetched now. `cache`: fetched before. `present`: it was at the goal already."""
_NAME_CHARS = 40
"""Of the goal's name in that of a work folder, which must fit NAME_MAX (255)."""


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """Where a package is, and what it took."""

    dir: Path
    origin: Origin
    fetched_bytes: int


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One package on its way.

    Attributes:
        store: Where it lies.
        resolved: What is fetched.
        cache: Shared by all pulls of this machine.
        transfer: How bytes are fetched.
        offline: Take it from the cache or fail.
        shared_parent: The user trusts who else may rename beside the goal.
    """

    store: Store
    resolved: Resolved
    cache: PackageCache
    transfer: Transfer
    offline: bool = False
    shared_parent: bool = False

    @property
    def _entry(self) -> Path:
        return self.cache.entry(self.resolved.place)

    @property
    def _digest(self) -> str:
        return self.resolved.package.digest

    @property
    def _files(self) -> list[FileDigest]:
        return files_of(self.resolved.package.manifest)

    def to_folder(
        self, to: Path, receipt: Callable[[Origin], bytes], *, through_cache: bool
    ) -> Delivered:
        """Fetch, verify, show at `to`.

        Args:
            to: Folder that is made.
            receipt: Content of `pull.json`, for how the package came.
            through_cache: Keep a copy in the cache.

        Raises:
            ConflictError: Something else is at the goal.
            CorruptError: The bytes are wrong; nothing is left.
            TransientError: The connection broke, or no space.
            NotFoundError: Offline, and it is not in the cache.
        """
        to = to.absolute()
        with disk_errors(f"write {to}", "--to"):
            if is_pulled(to, self._digest):
                with contextlib.suppress(OSError), self._beside(to, keep=None):
                    pass  # what a run left that was killed after its last step is removed
                return Delivered(dir=to, origin="present", fetched_bytes=0)
            try:
                require_free(to)
            except ConflictError:
                if not is_pulled(to, self._digest):
                    raise
                # Another pull of the same package was faster.
                return Delivered(dir=to, origin="present", fetched_bytes=0)
            make_folders(to.parent)
            if not through_cache and not self._entry.is_dir():
                with self._beside(to, keep=_can_go_on) as work:
                    fetched = self._fetch(work)
                    return self._show(work, to, receipt, "registry", fetched)
            return self._through_cache(to, receipt)

    def to_cache(self) -> tuple[Package, int]:
        """Have the package in the cache, every byte verified now; and how many were fetched.

        Raises:
            PipelineError: As in `to_folder`.
        """
        entry, fetched = self._entry, 0
        prefix = f".pull-{self._digest[:12]}-"
        with (
            self.cache.locked(self.resolved.place),
            disk_errors(f"write {self.cache.dir}", SETTING),
        ):
            self.cache.keep_statements(self.resolved.place, self._statements())
            if entry.is_dir():
                try:
                    if verify(entry).digest == self._digest:
                        with work_folder(self.cache.dir, prefix, setting=SETTING):
                            pass  # what a run left that was killed after its last step is removed
                        return self._package_at(entry), 0
                    raise CorruptError(f"{entry} holds another package than its name says")
                except CorruptError as error:
                    log.warning("%s; fetching it again", error)
                    remove_folder(entry)
            if self.offline:
                raise NotFoundError(
                    f"{self.resolved.place} is not in {self.cache.dir}, or was damaged there; pull "
                    "it without --offline"
                )
            with work_folder(self.cache.dir, prefix, _can_go_on, setting=SETTING) as work:
                fetched = self._fetch(work)
                (work.dir / PACKAGE / MANIFEST).write_bytes(self.resolved.data)
                settle_read_only(work.dir / PACKAGE)
                move_into_place(work.dir / PACKAGE, entry)
        return self._package_at(entry), fetched

    def _statements(self) -> list[RawStatement]:
        """The trusted statements, the one with the model signature whole."""
        statements, signed = list(self.resolved.statements), self.resolved.verification
        for index, raw in enumerate(statements):
            if signed.model_signature is None or raw.name != signed.model_signature.name:
                continue
            try:
                whole = self.store.read_statement(self.resolved.place, raw.name)
                files = verified_files(signed.model_signature, whole)
            except (CorruptError, NotFoundError) as error:
                log.warning("%s comes without model.sig: %s", self.resolved.place, error)
            else:
                statements[index] = RawStatement(
                    name=raw.name, files={ENVELOPE: raw.envelope, **files}
                )
        return statements

    def _package_at(self, folder: Path) -> Package:
        package = self.resolved.package
        return Package(dir=folder, manifest=package.manifest, digest=package.digest)

    def _through_cache(self, to: Path, receipt: Callable[[Origin], bytes]) -> Delivered:
        """From the cache to beside the goal, then there."""
        package, fetched = self.to_cache()
        origin: Origin = "registry" if fetched else "cache"
        _require_room(to.parent, sum(file.size_bytes for file in self._files))
        with self._beside(to, keep=None) as work:
            # The entry was verified a moment ago, and only we can write to it.
            copy_files(self._files, package.dir, work.dir / PACKAGE)
            return self._show(work, to, receipt, origin, fetched)

    def _show(
        self,
        work: WorkFolder,
        to: Path,
        receipt: Callable[[Origin], bytes],
        origin: Origin,
        fetched: int,
    ) -> Delivered:
        package = work.dir / PACKAGE
        finish(package, self.resolved, self._statements(), receipt(origin))
        if move_into_place(package, to):
            return Delivered(dir=to, origin=origin, fetched_bytes=fetched)
        if is_pulled(to, self._digest):  # another process pulled the same
            return Delivered(dir=to, origin="present", fetched_bytes=fetched)
        raise ConflictError(f"{to} was filled by another process; choose another with --to")

    def _beside(
        self, to: Path, keep: Callable[[BaseException], bool] | None
    ) -> contextlib.AbstractContextManager[WorkFolder]:
        """A work folder beside the goal."""
        prefix = f".{to.name[:_NAME_CHARS]}.pulling-"
        return work_folder(
            to.parent, prefix, keep, setting="--to", shared_parent=self.shared_parent
        )

    def _fetch(self, work: WorkFolder) -> int:
        """Fetch what is not there yet."""
        files, package = self._files, work.dir / PACKAGE
        total = sum(file.size_bytes for file in files)
        if work.adopted:
            _drop_foreign(package, {file.path for file in files})
        landed = _landed_bytes(files, work.dir, self._digest, self.transfer.chunk_bytes)
        _require_room(work.dir, total - landed)
        package.mkdir(mode=0o755, exist_ok=True)
        place = self.resolved.place
        with progress(f"Pulling {place}", total, BYTES) as on_bytes:
            return download(self.store, place, files, work, self._digest, self.transfer, on_bytes)


def _drop_foreign(package: Path, listed: set[str]) -> None:
    """Keep of a dead process's folder only what the manifest lists."""
    for path in sorted(package.rglob("*"), reverse=True):  # what is in a folder before it
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
        elif path.is_symlink() or path.relative_to(package).as_posix() not in listed:
            path.unlink()


def _landed_bytes(files: list[FileDigest], folder: Path, digest: str, chunk_bytes: int) -> int:
    """Bytes that an earlier run left in a work folder."""
    record = Record(folder=folder, digest=digest, chunk_bytes=chunk_bytes)
    return sum(
        max(0, min(chunk_bytes, files[file].size_bytes - chunk * chunk_bytes))
        for file, chunk in record.read()
        if 0 <= file < len(files) and chunk >= 0
    )


def _can_go_on(error: BaseException) -> bool:
    """Whether what has landed is worth keeping: not after a full disk, nor after wrong bytes."""
    if isinstance(error, TransientError):
        return getattr(error.__cause__, "errno", None) not in {errno.ENOSPC, errno.EDQUOT}
    return isinstance(error, KeyboardInterrupt)


def _require_room(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise TransientError(
            f"disk full: the package needs {needed_bytes / 1e9:.2f} GB in {folder}, "
            f"{free_bytes / 1e9:.2f} GB are free; free some and run the same command again"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
