"""The whole line of each recipe, in the formats that the build image makes, under either set."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_recipe import enginesmith

pytestmark = pytest.mark.slow

RECIPES = ("phi3", "mistral", "qwen2.5", "qwen3-4b", "llama3.1")


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
    env = {"HOME": str(tmp_path), "COLUMNS": "200"}
    done = enginesmith(tmp_path, "rehearse", recipe, f"compiler={compiler}", **env)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout + done.stderr
