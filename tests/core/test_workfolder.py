"""Work folders: ours alone, adopted from the dead, never from another user."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import workfolder
from pipeline.core.cache import atomic_folder
from pipeline.core.workfolder import work_folder


def _work(parent: Path, keep: Any = lambda error: True) -> Any:
    return work_folder(parent, ".p-", keep)


def _left_by_a_killed_process(parent: Path, size_bytes: int = 0) -> Path:
    """A work folder with a file, whose owner was killed."""
    pid = os.fork()
    if pid == 0:
        with _work(parent) as work:
            (work.dir / "chunk").write_bytes(b"x" * size_bytes)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    return max(parent.glob(".p-*"), key=lambda path: path.stat().st_mtime)


def test_a_folder_is_ours_alone_with_a_random_name_and_gone_after_the_block(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with _work(tmp_path) as first, _work(tmp_path) as second:
            assert first.dir != second.dir
            assert not first.adopted
            assert not second.adopted
            assert first.dir.stat().st_mode & 0o777 == 0o700
            assert second.dir.is_dir()
    finally:
        os.umask(old)
    assert list(tmp_path.iterdir()) == []


def test_of_what_killed_processes_left_one_is_adopted_and_the_rest_removed(tmp_path: Path) -> None:
    _left_by_a_killed_process(tmp_path)
    first = _left_by_a_killed_process(tmp_path)
    shutil.copytree(first, first.with_name(f"{first.name}0"), copy_function=shutil.copy2)
    with _work(tmp_path) as work:
        assert work.adopted
        assert list(tmp_path.iterdir()) == [work.dir]
    assert list(tmp_path.iterdir()) == []


def test_of_many_successors_one_adopts(tmp_path: Path, in_children: Any) -> None:
    _left_by_a_killed_process(tmp_path, 10_000)

    def follow() -> None:
        with _work(tmp_path) as work:
            assert work.adopted == (work.dir / "chunk").exists()
            if work.adopted:
                (tmp_path / f"adopted-{os.getpid()}").touch()
            time.sleep(0.5)

    assert in_children([follow] * 8) == [0] * 8
    assert len(list(tmp_path.glob("adopted-*"))) == 1


@pytest.mark.parametrize("keep", [None, lambda error: False, lambda error: True])
def test_an_exception_keeps_the_folder_only_where_that_was_asked_for(
    tmp_path: Path, keep: Any
) -> None:
    with pytest.raises(KeyboardInterrupt), _work(tmp_path, keep):
        raise KeyboardInterrupt
    assert bool(list(tmp_path.iterdir())) is bool(keep and keep(None))


@pytest.mark.parametrize("reason", ["another kernel's", "locks do nothing"])
def test_a_folder_whose_owner_cannot_be_seen_is_removed_after_a_day_and_never_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    folder = _left_by_a_killed_process(tmp_path)
    if reason == "locks do nothing":
        monkeypatch.setattr(fcntl, "flock", lambda *arguments: None)
    else:
        monkeypatch.setattr(workfolder, "_boot", lambda: "other")
    with _work(tmp_path) as work:
        assert not work.adopted
        assert folder.exists()
    # The clock of this machine plays no part: only that of the file system, which dates both.
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with _work(tmp_path):
        assert folder.exists()
    old = folder.stat().st_mtime - 25 * 3600
    os.utime(folder, (old, old))
    with _work(tmp_path) as work:
        assert not work.adopted
    assert list(tmp_path.iterdir()) == []


def make(target: Path) -> None:
    with atomic_folder(target) as private:
        (private / "who").write_text("me")


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
