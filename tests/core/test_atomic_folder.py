"""A folder appears complete or not at all, and only what a dead process left is swept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.core.atomic_folder import PREFIX, atomic_folder

ROOT = Path(__file__).parents[2]
CHILD = """
import sys, time
from pathlib import Path
from pipeline.core.atomic_folder import atomic_folder

with atomic_folder(Path(sys.argv[1])) as private:
    (private / "half").write_text("x")
    print(private, flush=True)
    time.sleep(60)
"""


def start_child(target: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process at work on `target`, and its private folder."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(target)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    return child, Path(child.stdout.readline().strip())


def make(target: Path) -> None:
    with atomic_folder(target) as private:
        (private / "who").write_text("me")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_next_run_removes_what_a_killed_one_left_and_spares_one_at_work(
    tmp_path: Path, number: signal.Signals
) -> None:
    child, private = start_child(tmp_path / "target")
    make(tmp_path / "other")
    assert (private / "half").exists()
    child.send_signal(number)
    child.communicate(timeout=10)
    assert private.exists()
    make(tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "target"]


def test_what_others_left_is_never_swept(tmp_path: Path) -> None:
    old = time.time() - 1e6
    link, shared, file = (tmp_path / f"{PREFIX}{name}" for name in ("link", "shared", "file"))
    stranger, elsewhere = tmp_path / ".partial-stranger", tmp_path / "elsewhere"
    for folder in (stranger, shared, elsewhere):
        folder.mkdir(mode=0o755)
        (folder / "theirs").write_text("theirs")
        os.utime(folder, (old, old))
    link.symlink_to(elsewhere)
    file.write_text("theirs")
    make(tmp_path / "target")
    assert all(path.exists() for path in (link, file, *(f / "theirs" for f in (stranger, shared))))


def test_exception_leaves_nothing_and_the_finished_folder_is_readable(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "a" / "target"):
        raise KeyboardInterrupt
    assert list((tmp_path / "a").iterdir()) == []
    make(tmp_path / "a" / "target")
    assert (tmp_path / "a" / "target").stat().st_mode & 0o777 == 0o755


def test_of_two_at_work_the_first_rename_wins(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with atomic_folder(target) as late:
        (late / "who").write_text("late")
        with atomic_folder(target) as early:
            (early / "who").write_text("early")
    assert (target / "who").read_text() == "early"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
