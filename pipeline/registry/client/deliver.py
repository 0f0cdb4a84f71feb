"""Bring a chosen package to where it is wanted: straight, or through the cache.

Nothing shows before all of it is there, verified and on the disk; then one rename shows it all.
What a broken pull leaves is a private folder beside the goal: the next pull goes on from it after
a lost connection, Ctrl-C or a kill. After a full disk or wrong bytes it is removed at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import ConflictError, CorruptError, NotFoundError, TransientError
from pipeline.registry.client.cache import PackageCache
from pipeline.registry.client.download import (
    PACKAGE,
    Transfer,
    download,
    files_of,
    landed_bytes,
)
from pipeline.registry.client.layout import copy_package, finish, present, require_free
from pipeline.registry.client.owned import Owned, owned_folder, remove_stale
from pipeline.registry.client.progress import byte_progress
from pipeline.registry.client.receipt import Came
from pipeline.registry.client.select import Candidate
from pipeline.registry.disk import disk_errors, make_folders, move_into_place
from pipeline.registry.manifest import MANIFEST
from pipeline.registry.package import verify
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.stores.store import Store

_NAME_CHARS = 40
"""Of the goal's name in that of a private folder, which must fit NAME_MAX (255)."""
_COPY_JOBS = 4


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Where a package is to be.

    Attributes:
        to: The folder that is made; None to leave it in the cache alone.
        cache: Shared by all pulls of this machine.
        through_cache: Keep a copy there.
        offline: Take it from there or fail.
    """

    to: Path | None
    cache: PackageCache
    through_cache: bool
    offline: bool = False


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """Where it is, and what it took."""

    dir: Path
    came: Came
    fetched_bytes: int


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One package on its way.

    Attributes:
        store: Where it lies.
        candidate: Its verified manifest and statements.
        policy: Whose model signature is put at `engine/model.sig`.
        transfer: How bytes are fetched.
        receipt: Content of `pull.json`, for how the package came.
    """

    store: Store
    candidate: Candidate
    policy: TrustPolicy
    transfer: Transfer
    receipt: Callable[[Came], bytes]

    @property
    def digest(self) -> str:
        return self.candidate.package.digest

    def deliver(self, goal: Goal) -> Delivered:
        """Fetch, verify, show.

        Raises:
            ConflictError: Something else is at the goal.
            CorruptError: The bytes are wrong; nothing is left.
            TransientError: The connection broke, or no space.
            NotFoundError: Offline, and it is not in the cache.
        """
        if goal.to is None:
            return self._cached(goal, lambda entry, fresh: self._verified(entry, fresh))
        to = goal.to.absolute()
        with disk_errors(f"write {to}"):
            if present(to, self.digest):
                with contextlib.suppress(OSError), owned_folder(to.parent, _beside(to)):
                    pass  # what a run left that was killed after its last step is removed
                return Delivered(dir=to, came="present", fetched_bytes=0)
            require_free(to)
            make_folders(to.parent)
            if not goal.through_cache and not goal.cache.entry(self.digest).is_dir():
                return self._straight(to)
            return self._cached(goal, lambda entry, fresh: self._copy(entry, to, check=not fresh))

    def _straight(self, to: Path) -> Delivered:
        """From the store to beside the goal, then there."""
        with owned_folder(to.parent, _beside(to), keep=_can_go_on) as owned:
            fetched = self._fetch(owned, to.parent, twice=None)
            package = owned.dir / PACKAGE
            finish(package, self.candidate, self.policy, self.receipt("registry"))
            return self._show(package, to, "registry", fetched)

    def _show(self, package: Path, to: Path, came: Came, fetched: int) -> Delivered:
        if move_into_place(package, to):
            return Delivered(dir=to, came=came, fetched_bytes=fetched)
        if present(to, self.digest):  # another process pulled the same
            return Delivered(dir=to, came="present", fetched_bytes=fetched)
        raise ConflictError(f"{to} was filled by somebody else meanwhile; choose another with --to")

    def _cached(self, goal: Goal, use: Callable[[Path, bool], Delivered | None]) -> Delivered:
        """Through the cache: a damaged entry is fetched again, once."""
        cache = goal.cache
        for last in (False, True):
            fetched, fresh = self._ensure(goal)
            try:
                done = use(cache.entry(self.digest), fresh)
            except CorruptError as error:
                if last or fresh:
                    raise
                cache.quarantine(self.digest, error)
            except FileNotFoundError:  # another process found it damaged at the same time
                if last:
                    raise
            else:
                came: Came = "registry" if fetched else "cache"
                return done or Delivered(
                    dir=(goal.to or cache.entry(self.digest)).absolute(),
                    came=came,
                    fetched_bytes=fetched,
                )
        raise AssertionError("the loop returns or raises")

    def _ensure(self, goal: Goal) -> tuple[int, bool]:
        """Have the package in the cache; bytes fetched, and whether they were verified just now."""
        cache = goal.cache
        with disk_errors(f"write {cache.dir}"):
            if goal.offline:
                if not cache.entry(self.digest).is_dir():
                    raise NotFoundError(
                        f"{self.candidate.what} is not in {cache.dir}, or was damaged there; pull "
                        "it without --offline"
                    )
                return 0, False
            cache.dir.mkdir(parents=True, exist_ok=True)
            cache.keep_statements(self.digest, self.candidate.statements_dir)
            with cache.lock(self.digest):
                if cache.entry(self.digest).is_dir():
                    return 0, False
                prefix = f".pull-{self.digest[:12]}-"
                with owned_folder(cache.dir, prefix, keep=_can_go_on) as owned:
                    fetched = self._fetch(owned, cache.dir, twice=goal.to)
                    package = owned.dir / PACKAGE
                    (package / MANIFEST).write_bytes(self.candidate.data)
                    cache.keep(package, self.digest)
                remove_stale(cache.dir, ".pull-")
        return fetched, True

    def _verified(self, entry: Path, fresh: bool) -> None:
        if not fresh and verify(entry).digest != self.digest:
            raise CorruptError(f"{entry} holds another package than its name says")

    def _copy(self, entry: Path, to: Path, *, check: bool) -> Delivered | None:
        """From the cache to beside the goal, then there."""
        files = files_of(self.candidate.package.manifest)
        _require_room(to.parent, sum(file.size_bytes for file in files))
        with owned_folder(to.parent, _beside(to)) as owned:
            package = owned.dir / PACKAGE
            copy_package(files, entry, package, check=check, jobs=_COPY_JOBS)
            finish(package, self.candidate, self.policy, self.receipt("cache"))
            shown = self._show(package, to, "cache", 0)
            return shown if shown.came == "present" else None

    def _fetch(self, owned: Owned, where: Path, *, twice: Path | None) -> int:
        """Fetch what is not there yet.

        Args:
            owned: Gets the files.
            where: On the same file system.
            twice: The goal that gets a second copy, if there is one.
        """
        files = files_of(self.candidate.package.manifest)
        total = sum(file.size_bytes for file in files)
        if owned.adopted:
            self._drop_foreign(owned)
        left = total - landed_bytes(files, owned, self.digest, self.transfer)
        copy = total if twice is not None and _one_disk(where, twice.absolute().parent) else 0
        _require_room(where, left + copy)
        (owned.dir / PACKAGE).mkdir(exist_ok=True)
        with byte_progress(f"Pulling {self.candidate.what}", total) as on_bytes:
            place = self.candidate.offer.place
            return download(self.store, place, files, owned, self.digest, self.transfer, on_bytes)

    def _drop_foreign(self, owned: Owned) -> None:
        """Keep of a dead process's folder only what the manifest lists."""
        package = owned.dir / PACKAGE
        listed = {file["path"] for file in self.candidate.package.manifest["files"]}
        for path in sorted(package.rglob("*"), reverse=True):  # what is in a folder before it
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()
            elif path.is_symlink() or path.relative_to(package).as_posix() not in listed:
                path.unlink()


def _beside(to: Path) -> str:
    """How the names of private folders for a goal begin."""
    return f".{to.name[:_NAME_CHARS]}.pulling-"


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


def _one_disk(left: Path, right: Path) -> bool:
    while not right.exists():
        right = right.parent
    return left.stat().st_dev == right.stat().st_dev
