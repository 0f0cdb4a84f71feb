from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.cache import PREFIX, Stage, StageCache, digest_folder

S = Stage(name="s", version=1, code=())
T = Stage(name="t", version=1, code=())
ROOT = Path(__file__).parents[2]
CHILD = """
import sys, time
from pathlib import Path
from pipeline.core.cache import StageCache
from pipeline.core.cache import Stage

root, seconds = Path(sys.argv[1]), float(sys.argv[2])

def produce(out):
    (out / "result.txt").write_text("done")
    with (root / "calls").open("a") as stream:
        stream.write("x")
    time.sleep(seconds)

print(StageCache(root=root).run(Stage(name="s", version=1, code=()), {"a": 1}, produce).dir)
"""


def writing(text: str, calls: list[str]) -> Callable[[Path], None]:
    def produce(out: Path) -> None:
        calls.append(text)
        (out / "result.txt").write_text(text)

    return produce


def start_child(root: Path, seconds: float) -> subprocess.Popen[str]:
    root.mkdir(exist_ok=True)
    command = [sys.executable, "-c", CHILD, str(root), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for_calls(root: Path) -> None:
    end = time.monotonic() + 20
    while not (root / "calls").exists():
        assert time.monotonic() < end, "the child never started to produce"
        time.sleep(0.02)


def partials(root: Path) -> list[Path]:
    return list(root.rglob(f"{PREFIX}*"))


def test_second_run_is_taken_from_the_cache(tmp_path: Path) -> None:
    cache, calls = StageCache(root=tmp_path), list[str]()
    first = cache.run(S, {"a": 1}, writing("one", calls))
    second = cache.run(S, {"a": 1}, writing("two", calls))
    assert calls == ["one"]
    assert (first.dir, first.key, first.digest) == (second.dir, second.key, second.digest)
    assert (second.dir / "result.txt").read_text() == "one"
    assert partials(tmp_path) == []


def test_key_changes_with_inputs_and_stage(tmp_path: Path) -> None:
    cache, calls = StageCache(root=tmp_path), list[str]()
    runs: list[tuple[Stage, dict[str, Any]]] = [
        (S, {"a": 1}),
        (S, {"a": 2}),
        (S, {"a": 1, "b": None}),
        (T, {"a": 1}),
        (replace(S, version=2), {"a": 1}),
    ]
    keys = {cache.run(stage, inputs, writing("x", calls)).key for stage, inputs in runs}
    assert len(keys) == len(calls) == 5


def test_outputs_digest_follows_content_and_not_mtimes(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    file = tmp_path / "below" / "file"
    file.write_text("one")
    before = digest_folder(tmp_path)
    assert before[0].path == "below/file"
    os.utime(file, (0, 0))
    assert digest_folder(tmp_path) == before
    file.write_text("two")
    assert digest_folder(tmp_path) != before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_removes_the_private_folder_and_finishes_nothing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    cache, calls = StageCache(root=tmp_path), list[str]()

    def fail(out: Path) -> None:
        (out / "half").write_text("x")
        raise error

    with pytest.raises(error):
        cache.run(S, {}, fail)
    assert list((tmp_path / "stages" / "s").iterdir()) == []
    cache.run(S, {}, writing("one", calls))
    assert calls == ["one"]


def test_killed_run_leaves_nothing_that_counts_as_finished(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    child = start_child(root, 60)
    wait_for_calls(root)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=10)
    (leftover,) = partials(root)
    calls: list[str] = []
    made = StageCache(root=root).run(S, {"a": 1}, writing("again", calls))
    assert calls == ["again"]
    assert (made.dir / "result.txt").read_text() == "again"
    assert not leftover.exists()


def test_of_two_processes_with_one_key_one_produces(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    first = start_child(root, 0.5)
    wait_for_calls(root)
    second = start_child(root, 0.5)
    folders = {child.communicate(timeout=30)[0].strip() for child in (first, second)}
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(folders) == 1
    assert (root / "calls").read_text() == "x"
