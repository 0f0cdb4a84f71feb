"""The process that makes the artifact ends with the race."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.core.test_process import ROOT, alive, wait_for


def test_preparation_does_not_outlive_a_killed_race(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.acceptance.race.slow_preparation", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    mark = tmp_path / "pid"
    try:
        assert wait_for(lambda: mark.exists() and mark.read_text(), seconds=60)
        worker = int(mark.read_text())
        assert worker != process.pid
        assert alive(worker)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert wait_for(lambda: not alive(worker))
