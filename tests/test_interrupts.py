"""Ctrl-C and SIGKILL in every stage: nothing half-made is left, and the next run completes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.tiny_recipe import Workplace

pytestmark = pytest.mark.slow

STAGES = (
    "quantize", "convert", "network-check", "compile-trtrtx",
    "source-logits", "source-chat", "reference-logits",
)  # fmt: skip
"""In order; the last three are the first things that acceptance does."""


def place_before(stage: str, built: Workplace, root: Path) -> Workplace:
    """Nothing published, and every stage before `stage` in the cache."""
    place = built.copy(root, packages=False)
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(place.cache / "stages" / later)
    return place


def processes_of(place: Workplace) -> list[int]:
    """Ids of all processes that work in this place, by the cache that they were told to use."""
    mark = f"ENGINESMITH_CACHE={place.cache}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def signal_in(place: Workplace, stage: str, number: int) -> tuple[int, str]:
    """Build, and send a signal to the process group when `stage` starts; exit code and log."""
    process = subprocess.Popen(
        place.command("build", "tiny", "--config-dir", str(place.recipes)),
        cwd=place.root,
        env=place.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if f" {stage}: started" in line:
            if stage in {"network-check", "compile-trtrtx"}:
                wait_for_child(place)
            os.killpg(process.pid, number)
            break
    lines += process.stderr.readlines()
    return process.wait(timeout=60), "".join(lines)


def wait_for_child(place: Workplace) -> None:
    deadline = time.monotonic() + 10
    while len(processes_of(place)) < 2:
        assert time.monotonic() < deadline, "no child process"
        time.sleep(0.01)


def finished_stages(place: Workplace) -> set[str]:
    return {path.parent.parent.name for path in place.cache.glob("stages/*/*/stage.json")}


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_leaves_nothing_half_made(stage: str, built: Workplace, tmp_path: Path) -> None:
    place = place_before(stage, built, tmp_path / "place")
    code, log = signal_in(place, stage, signal.SIGINT)
    assert code == 130, log
    # A native library that is stopped while it loads prints a traceback of its own.
    assert "bug in enginesmith" not in log
    assert processes_of(place) == []
    assert place.verdict()["exit_code"] == 130
    assert place.leftovers() == []
    assert place.packages() == []
    assert {path.parent.name for path in place.cache.glob("stages/*/*")} == finished_stages(place)
    if stage != "convert":  # too short to be hit with certainty
        assert stage not in finished_stages(place)


@pytest.mark.parametrize("stage", ["quantize", "compile-trtrtx"])
def test_build_completes_after_ctrl_c(stage: str, built: Workplace, tmp_path: Path) -> None:
    place = place_before(stage, built, tmp_path / "place")
    assert signal_in(place, stage, signal.SIGINT)[0] == 130
    done = place.build()
    assert done.returncode == 0, done.stderr
    assert f" {stage}: started" in done.stderr
    assert len(place.packages()) == 1


def test_build_completes_after_sigkill_in_the_compiler(built: Workplace, tmp_path: Path) -> None:
    place = place_before("compile-trtrtx", built, tmp_path / "place")
    code, _ = signal_in(place, "compile-trtrtx", signal.SIGKILL)
    assert code == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while processes_of(place):
        assert time.monotonic() < deadline, "the compiler outlived the killed build"
        time.sleep(0.05)
    assert "compile-trtrtx" not in finished_stages(place)
    assert place.packages() == []
    done = place.build()
    assert done.returncode == 0, done.stderr
    assert " compile-trtrtx: started" in done.stderr
    assert finished_stages(place) == set(STAGES)
    assert len(place.packages()) == 1
    assert place.leftovers() == []
