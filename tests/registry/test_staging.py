"""Private folders: whoever works in one keeps it, and what a killed run left goes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.registry.staging import abandoned, private_folder


def test_many_threads_each_keep_their_folder_until_they_are_done(tmp_path: Path) -> None:
    def work(number: int) -> bool:
        with private_folder(tmp_path) as folder:
            (folder / "file").write_text(str(number))
            return (folder / "file").read_text() == str(number)

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(work, range(300)))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with private_folder(tmp_path) as folder:
            (folder / "file").touch()
            os._exit(9)
    os.waitpid(child, 0)
    assert len(abandoned(tmp_path)) == 1
    with private_folder(tmp_path) as ours:
        assert list(tmp_path.iterdir()) == [ours]
        assert abandoned(tmp_path) == []
