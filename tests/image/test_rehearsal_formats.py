"""The whole line of each recipe, in the formats that the build image makes, under either set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("phi3", "mistral", "qwen2.5", "llama3.1")


@pytest.mark.parametrize(
    ("recipe", "compiler", "shown"),
    [
        *((recipe, "trtllm", "not run: trtllm-build --checkpoint_dir") for recipe in RECIPES),
        *((recipe, "checkpoint", f"package {recipe}/any-checkpoint") for recipe in RECIPES),
    ],
)
def test_recipe_is_rehearsed_without_tensorrt_rtx(
    tmp_path: Path, recipe: str, compiler: str, shown: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "rehearse", recipe, f"compiler={compiler}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout + done.stderr
