"""One copy per digest for everybody on this machine: `$ENGINESMITH_CACHE/packages`.

    packages/<digest>/               manifest.json, engine/: a whole package, read-only
    packages/<digest>.statements/    what was said about it when it was last pulled
    packages/.pull-<digest>-...      on its way; see `owned`

An entry appears by one rename and never changes. Many pullers of one digest wait for a lock, so
that one downloads; where locks do nothing, each downloads into a folder of its own and the first
rename wins. An entry is verified whenever it is used; a damaged one is moved to `.damaged-<digest>`
and fetched again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import CorruptError
from pipeline.registry.client.layout import copy_statements
from pipeline.registry.disk import move_into_place, settle
from pipeline.registry.reference import STATEMENTS_SUFFIX, check_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PackageCache:
    """The cache of packages below `root`, the cache of everything."""

    root: Path

    @property
    def dir(self) -> Path:
        return self.root / "packages"

    def entry(self, digest: str) -> Path:
        """Where the package with this digest is, or would be."""
        return self.dir / check_digest(digest)

    def statements(self, digest: str) -> Path:
        """What was said about it."""
        return self.dir / f"{check_digest(digest)}{STATEMENTS_SUFFIX}"

    @contextlib.contextmanager
    def lock(self, digest: str) -> Iterator[None]:
        """Hold a digest; says so when it has to wait. Does nothing where there are no locks."""
        path = self.root / "locks" / f"package-{digest[:24]}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("Another process is pulling %s; waiting for it", digest[:12])
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}:
                    raise
            yield

    def keep(self, package_dir: Path, digest: str) -> Path:
        """Make a whole, verified package an entry; if there is one already, it stays."""
        settle(package_dir)
        entry = self.entry(digest)
        if not move_into_place(package_dir, entry):
            log.debug("%s was pulled by another process, too", digest)
        return entry

    def keep_statements(self, digest: str, folder: Path) -> None:
        """Remember verified statements, so that the entry can be verified offline."""
        target = self.statements(digest)
        target.mkdir(parents=True, exist_ok=True)
        copy_statements(folder, target, replace=True)

    def quarantine(self, digest: str, reason: CorruptError) -> None:
        """Move a damaged entry out of everybody's way; only the last one is kept, to look at."""
        aside = self.dir / f".damaged-{digest}"
        log.warning("%s; moved to %s", reason, aside)
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            try:
                os.rename(self.entry(digest), aside)  # noqa: PTH104
            except OSError as error:
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                    raise
                shutil.rmtree(self.entry(digest), ignore_errors=True)
