"""A preparation that takes a minute: `python -m tests.acceptance.race.slow_preparation FOLDER`."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.acceptance.race.prepare import prepare


@dataclass(frozen=True)
class SlowSource:
    """Writes who fetches, and takes its time."""

    mark: Path

    def fetch(self) -> None:
        self.mark.write_text(str(os.getpid()))
        time.sleep(60)


@dataclass(frozen=True)
class SlowRecipe:
    """As much of a recipe as is asked before the fetch is over."""

    source: SlowSource


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    prepare(SlowRecipe(SlowSource(folder / "pid")), folder, folder)  # type: ignore[arg-type]
