"""Private folders outlive their owner for the next one, and only a dead owner's."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.registry.client import owned
from pipeline.registry.client.owned import owned_folder


def _left_by_a_killed_process(parent: Path) -> Path:
    pid = os.fork()
    if pid == 0:
        with owned_folder(parent, ".p-", keep=lambda error: True) as mine:
            (mine.dir / "piece").write_text("landed")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (folder,) = parent.glob(".p-*")
    return folder


def test_a_killed_processs_folder_is_adopted(tmp_path: Path) -> None:
    _left_by_a_killed_process(tmp_path)
    with owned_folder(tmp_path, ".p-", keep=lambda error: True) as mine:
        assert mine.adopted
        assert (mine.dir / "piece").read_text() == "landed"
    assert list(tmp_path.iterdir()) == []


def test_a_living_owners_folder_is_left_alone(tmp_path: Path) -> None:
    with owned_folder(tmp_path, ".p-", keep=lambda error: True) as first:
        (first.dir / "piece").write_text("mine")
        with owned_folder(tmp_path, ".p-", keep=lambda error: True) as second:
            assert not second.adopted
            assert second.dir != first.dir
        assert (first.dir / "piece").read_text() == "mine"


def test_the_folder_of_a_container_that_was_restarted_is_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another PID namespace: only the lock tells that the owner is dead."""
    _left_by_a_killed_process(tmp_path)
    monkeypatch.setattr(owned, "_pid_space", lambda: "1")
    with owned_folder(tmp_path, ".p-", keep=lambda error: True) as mine:
        assert mine.adopted


def test_another_machines_folder_is_left_alone_for_a_day_and_then_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _left_by_a_killed_process(tmp_path)
    monkeypatch.setattr(owned, "_boot", lambda: "other")
    with owned_folder(tmp_path, ".p-", keep=lambda error: True) as mine:
        assert not mine.adopted
        assert folder.exists()
    old = time.time() - 25 * 3600
    for path in (folder / "owner", folder):
        os.utime(path, (old, old))
    with owned_folder(tmp_path, ".p-", keep=lambda error: True) as mine:
        assert not mine.adopted
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other_space", [False, True])
def test_where_locks_do_nothing_only_a_process_that_we_see_dead_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_space: bool
) -> None:
    _left_by_a_killed_process(tmp_path)
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: None)
    if other_space:
        monkeypatch.setattr(owned, "_pid_space", lambda: "1")
    with owned_folder(tmp_path, ".p-", keep=lambda error: True) as mine:
        assert mine.adopted is not other_space
        with owned_folder(tmp_path, ".p-", keep=lambda error: True) as second:
            assert not second.adopted  # we live


def test_of_many_successors_one_adopts(tmp_path: Path, in_children: Any) -> None:
    _left_by_a_killed_process(tmp_path)

    def follow() -> None:
        with owned_folder(tmp_path, ".p-", keep=lambda error: True) as mine:
            assert mine.adopted == (mine.dir / "piece").exists()
            if mine.adopted:
                (tmp_path / f"adopted-{os.getpid()}").touch()
            time.sleep(0.5)

    assert in_children([follow] * 8) == [0] * 8
    assert len(list(tmp_path.glob("adopted-*"))) == 1


@pytest.mark.parametrize("keep", [None, lambda error: False, lambda error: True])
def test_an_exception_keeps_the_folder_only_where_that_was_asked_for(
    tmp_path: Path, keep: Any
) -> None:
    with pytest.raises(KeyboardInterrupt), owned_folder(tmp_path, ".p-", keep=keep):
        raise KeyboardInterrupt
    kept = bool(keep and keep(None))
    assert bool(list(tmp_path.iterdir())) is kept


def test_a_new_run_that_adopts_nothing_removes_what_is_dead(tmp_path: Path) -> None:
    _left_by_a_killed_process(tmp_path)
    with owned_folder(tmp_path, ".p-") as mine:
        assert not mine.adopted
        assert [path.name for path in tmp_path.iterdir()] == [mine.dir.name]


def test_a_folder_whose_owner_was_killed_while_it_removed_it_goes_and_is_not_adopted(
    tmp_path: Path,
) -> None:
    (_left_by_a_killed_process(tmp_path) / "owner").unlink()
    with owned_folder(tmp_path, ".p-", keep=lambda error: True) as mine:
        assert not mine.adopted
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_its_living_owner_removes_is_left_to_it(tmp_path: Path) -> None:
    with owned_folder(tmp_path, ".p-") as first:
        (first.dir / "owner").unlink()
        with owned_folder(tmp_path, ".p-", keep=lambda error: True) as second:
            assert not second.adopted
        assert first.dir.is_dir()
