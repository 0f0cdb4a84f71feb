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

from pipeline.core.errors import AccessError
from pipeline.registry import workfolder
from pipeline.registry.workfolder import WorkFolder, require_private_parent, work_folder

_STRANGER = 65534


def _work(parent: Path, keep: Any = lambda error: True, **more: Any) -> Any:
    return work_folder(parent, ".p-", keep, setting="--to", **more)


def _left_by_a_killed_process(parent: Path, size_bytes: int = 0) -> Path:
    """A work folder with a file, whose owner was killed."""
    pid = os.fork()
    if pid == 0:
        with _work(parent) as work:
            (work.dir / "chunk").write_bytes(b"x" * size_bytes)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    return max(parent.glob(".p-*"), key=lambda path: path.stat().st_mtime)


def test_a_folder_is_ours_alone_with_a_random_name_and_gone_after_the_block(
    tmp_path: Path,
) -> None:
    old = os.umask(0)
    try:
        with _work(tmp_path) as first, _work(tmp_path) as second:
            assert first.dir != second.dir
            assert not first.adopted
            assert not second.adopted
            assert first.dir.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(old)
    assert list(tmp_path.iterdir()) == []


def test_of_what_killed_processes_left_one_is_adopted_and_the_rest_removed(
    tmp_path: Path,
) -> None:
    _left_by_a_killed_process(tmp_path)
    first = _left_by_a_killed_process(tmp_path)
    shutil.copytree(first, first.with_name(f"{first.name}0"), copy_function=shutil.copy2)
    with _work(tmp_path) as work:
        assert work.adopted
        assert list(tmp_path.iterdir()) == [work.dir]
    assert list(tmp_path.iterdir()) == []


def test_a_living_owners_folder_is_left_alone(tmp_path: Path) -> None:
    with _work(tmp_path) as first, _work(tmp_path) as second:
        assert not second.adopted
        assert first.dir.is_dir()


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


def _planted_by(parent: Path, uid: int, *, mode: int = 0o700) -> Path:
    folder = parent / f".p-{workfolder._boot()}-0123456789abcdef"
    folder.mkdir(mode=mode)
    (folder / "landed.jsonl").write_text("planted")
    folder.chmod(mode)
    os.chown(folder, uid, uid)
    return folder


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="gives files to another user")


@needs_root
@pytest.mark.parametrize("plant", ["another user's", "open to others", "a link"])
def test_a_planted_folder_is_neither_adopted_nor_touched(tmp_path: Path, plant: str) -> None:
    tmp_path.chmod(0o1777)
    if plant == "another user's":
        folder = _planted_by(tmp_path, _STRANGER)
    elif plant == "open to others":
        folder = _planted_by(tmp_path, 0, mode=0o777)
    else:
        aside = _planted_by(tmp_path, 0).rename(tmp_path / "aside")
        folder = tmp_path / f".p-{workfolder._boot()}-0123456789abcdef"
        folder.symlink_to(aside)
    with _work(tmp_path) as work:
        assert not work.adopted
        assert work.dir != folder
    assert (folder / "landed.jsonl").read_text() == "planted"


@needs_root
@pytest.mark.parametrize(
    ("mode", "uid", "gid", "reason"),
    [
        (0o777, 0, 0, "is writable by everyone"),
        (0o775, 0, 7, "is writable by group 7"),
        (0o755, _STRANGER, 0, "belongs to"),
        (0o1777, _STRANGER, 0, "belongs to"),
    ],
)
def test_a_parent_that_another_user_can_rename_in_is_refused_with_the_way_out(
    tmp_path: Path, mode: int, uid: int, gid: int, reason: str
) -> None:
    shared = tmp_path / "shared"
    parent = shared / "below"
    parent.mkdir(parents=True)
    os.chown(shared, uid, gid)
    shared.chmod(mode)
    for folder in (shared, parent):
        with pytest.raises(AccessError, match=f"{shared} {reason}.*--to.*--allow-shared-parent"):
            require_private_parent(folder, "--to")
        with pytest.raises(AccessError), _work(folder):
            pass
        assert not list(folder.glob(".p-*"))
    with _work(parent, shared_parent=True) as work:
        assert isinstance(work, WorkFolder)


@needs_root
@pytest.mark.parametrize(("mode", "gid"), [(0o1777, 0), (0o755, 7), (0o775, 0)])
def test_a_sticky_parent_and_the_users_own_group_are_fine(
    tmp_path: Path, mode: int, gid: int
) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    os.chown(parent, 0, gid)
    parent.chmod(mode)
    with _work(parent) as work:
        assert work.dir.parent == parent
