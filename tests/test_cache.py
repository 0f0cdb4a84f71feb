"""The stage cache: nothing half-made counts, and equal inputs are worked on once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cache import StageCache, source_digest

ROOT = Path(__file__).parent.parent
CHILD = """
import sys, time
from pathlib import Path
from pipeline.cache import StageCache
root, seconds = Path(sys.argv[1]), float(sys.argv[2])
def produce(out):
    (out / "a").write_text("half")
    (root / f"begun-{time.time_ns()}").write_text("")
    time.sleep(seconds)
    (out / "a").write_text("whole")
print(StageCache(root=root).run("s", {"k": 1}, produce).read_json("stage.json")["digest"])
"""


def child(root: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root), str(seconds)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def begun(root: Path) -> int:
    return len(list(root.glob("begun-*")))


def wait_until_begun(root: Path) -> None:
    deadline = time.monotonic() + 20
    while not begun(root):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def whole(out: Path) -> None:
    (out / "a").write_text("whole")


def test_killed_run_leaves_nothing_that_counts(tmp_path: Path) -> None:
    process = child(tmp_path, 60)
    wait_until_begun(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = StageCache(root=tmp_path).run("s", {"k": 1}, whole)
    assert not result.cached
    assert (result.dir / "a").read_text() == "whole"


def test_two_runs_at_once_work_once_and_end_alike(tmp_path: Path) -> None:
    first, second = child(tmp_path, 1.0), child(tmp_path, 1.0)
    outputs = {first.communicate(timeout=60)[0], second.communicate(timeout=60)[0]}
    assert len(outputs) == 1
    assert outputs != {""}
    assert begun(tmp_path) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_stage_leaves_no_folder(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(out: Path) -> None:
        whole(out)
        raise error

    with pytest.raises(error):
        StageCache(root=tmp_path).run("s", {}, fail)
    assert list((tmp_path / "stages" / "s").iterdir()) == []


def test_damaged_result_is_made_again(tmp_path: Path) -> None:
    cache = StageCache(root=tmp_path)
    first = cache.run("s", {}, whole)
    (first.dir / "a").write_text("who")
    assert not cache.run("s", {}, whole).cached
    assert (first.dir / "a").read_text() == "whole"
    (first.dir / "stage.json").write_text("{")
    assert not cache.run("s", {}, whole).cached


def test_key_follows_content_not_time(tmp_path: Path) -> None:
    cache = StageCache(root=tmp_path)
    first = cache.run("s", {"x": [1, "a"]}, whole)
    os.utime(first.dir / "a", (1, 1))
    assert cache.run("s", {"x": [1, "a"]}, whole).cached
    assert not cache.run("s", {"x": [1, "b"]}, whole).cached
    assert not cache.run("t", {"x": [1, "a"]}, whole).cached


def test_source_digest_follows_the_code_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "demo_stage"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    (package / "code.py").write_text("A = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = source_digest("demo_stage")
    assert before == source_digest("demo_stage")
    (package / "code.py").write_text("A = 2\n")
    assert source_digest("demo_stage") != before
    assert "demo_stage" not in sys.modules
