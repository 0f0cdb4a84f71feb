"""The main job on SmolLM2's real weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def enginesmith(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_smollm2_is_built_checked_taken_again_and_answers(tmp_path: Path) -> None:
    first = enginesmith(tmp_path, "build", "smollm2")
    assert first.returncode == 0, first.stdout + first.stderr
    verdict = json.loads((tmp_path / "artifacts/.runs/latest/verdict.json").read_text())
    assert verdict["verdict"] == "checked"
    report = json.loads((tmp_path / verdict["report"]).read_text())
    assert report["quality"]["tokens"] >= 8192
    assert report["quality"]["perplexity_change"]["value"] <= 0.01
    assert 0.85 <= report["quality"]["top1_agreement"]["value"] <= 1.0
    assert "Paris" in report["quality"]["sample"]["answer"]

    begun = time.monotonic()
    second = enginesmith(tmp_path, "build", "smollm2")
    assert second.returncode == 0, second.stderr
    assert time.monotonic() - begun <= 5.0
    assert "Taken, published before" in second.stdout

    answer = enginesmith(
        tmp_path, "generate", "smollm2:candidate", "What is the capital of France?"
    )
    assert answer.returncode == 0, answer.stderr
    assert "Paris" in answer.stdout
