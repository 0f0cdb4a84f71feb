"""The timing cache: measured kernels, so that the next build on the same card skips measuring them.

TensorRT takes a cache only from the same version and card; so do we, by the folder's name. The
file is replaced by one rename, so that a build that runs beside it reads an old one or a new one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.formats.trtllm.command import TIMING_CACHE_FILE
from pipeline.formats.trtllm.environment import Environment


@dataclass(frozen=True)
class TimingCache:
    """The cache of one environment, below the stage cache's root."""

    root: Path
    environment: Environment

    @property
    def file(self) -> Path:
        """Where it is kept."""
        return self.root / "timing" / self.environment.key[:24] / TIMING_CACHE_FILE

    def lend(self, folder: Path) -> Path | None:
        """Copy it into `folder`; None when there is none yet."""
        try:
            return Path(shutil.copyfile(self.file, folder / TIMING_CACHE_FILE))
        except FileNotFoundError:
            return None

    def keep(self, folder: Path) -> None:
        """Store what a build wrote into `folder`; nothing, if it wrote none or an empty one."""
        written = folder / TIMING_CACHE_FILE
        if not written.is_file() or written.stat().st_size == 0:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self.file.parent, prefix=".partial-")
        os.close(descriptor)
        private = Path(name)
        try:
            shutil.copyfile(written, private)
            private.chmod(0o644)
            private.replace(self.file)
        finally:
            private.unlink(missing_ok=True)
