"""Private folders of many threads in one area."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.registry.staging import private_folder


def test_no_thread_takes_the_new_folder_of_another_for_abandoned(tmp_path: Path) -> None:
    def work(number: int) -> bool:
        with private_folder(tmp_path / "area") as folder:
            (folder / "file").write_text(str(number))
            return (folder / "file").read_text() == str(number)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(400)))
    assert list((tmp_path / "area").iterdir()) == []


def test_what_a_dead_run_left_goes_with_the_next_folder(tmp_path: Path) -> None:
    (tmp_path / "area" / "left").mkdir(parents=True)
    with private_folder(tmp_path / "area") as folder:
        assert list((tmp_path / "area").iterdir()) == [folder]
