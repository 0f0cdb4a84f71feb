"""The main job on real weights, through the command that users type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def enginesmith(work: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *words],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    done = enginesmith(work, "build", "smollm2")
    assert done.returncode == 0, done.stderr
    return work


def test_quality_is_within_one_percent_and_the_verdict_is_checked(built: Path) -> None:
    verdict = json.loads((built / "artifacts/.runs/latest/verdict.json").read_text())
    assert verdict["verdict"] == "checked"
    report = json.loads(Path(verdict["report"]).read_text())
    assert report["quality"]["tokens"] >= 8192
    assert report["quality"]["perplexity_change"]["value"] <= 0.01
    assert report["checks"]["plan"]["quantized_linears"] == 78
    assert "RTX-4090" in report["not_run"][0]
    print(json.dumps({"quality": report["quality"], "speed": report["speed"]}, indent=1))


def test_second_time_takes_the_package_and_starts_no_stage(built: Path) -> None:
    done = enginesmith(built, "build", "smollm2")
    assert done.returncode == 0
    assert "Taken" in done.stdout
    assert "started" not in done.stderr


def test_package_answers_and_says_what_answers(built: Path) -> None:
    done = enginesmith(built, "generate", "smollm2:candidate", "What is the capital of France?")
    assert "Paris" in done.stdout
    assert "onnxruntime answers for it" in done.stderr
