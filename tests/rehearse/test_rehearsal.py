"""Every shipped recipe is rehearsed: the whole line, all three formats, random weights."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.folders import config_folders
from pipeline.core.errors import IncompatibleError, RecipeError
from pipeline.registry.manifest import manifest_at
from pipeline.registry.package import require_manifest_publishable
from pipeline.registry.stores.folder import FolderRegistry
from pipeline.rehearse.rehearsal import compose, run_rehearsal

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def _rehearse(
    folder: Path, *arguments: str, **env: str
) -> tuple[subprocess.CompletedProcess[str], Any]:
    """`enginesmith rehearse ARGUMENTS --json` in an empty folder, with no tool on the PATH."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "rehearse", *arguments, "--json"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PATH": str(folder),
            "HOME": str(folder),
            **env,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done, json.loads(done.stdout) if done.stdout.startswith("{") else None


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_rehearsed_in_every_format(recipe: str, tmp_path: Path) -> None:
    done, result = _rehearse(tmp_path, recipe, "--keep", "kept")
    assert done.returncode == 0, done.stderr
    states = {entry["format"]: entry["state"] for entry in result["formats"]}
    assert states == {"trtllm": "stopped", "trtrtx": "good", "checkpoint": "good"}
    trtllm = next(entry for entry in result["formats"] if entry["format"] == "trtllm")
    assert "not run: trtllm-build --checkpoint_dir" in trtllm["detail"]
    assert not (tmp_path / "artifacts").exists()
    assert "Published" not in done.stderr
    assert "Made a key" not in done.stderr

    store = FolderRegistry(path=tmp_path / "kept" / "registry").store()
    places = store.places()
    assert len(places) == 2
    for place in places:
        manifest, _ = manifest_at(store, place)
        assert manifest["source"]["random"] is True
        with pytest.raises(RecipeError, match="random"):
            require_manifest_publishable(manifest, public=False)


@pytest.mark.slow
def test_nothing_is_left_behind_and_nothing_is_published(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    done, _ = _rehearse(tmp_path, "smollm2", "compiler=checkpoint", TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "tmp").glob("enginesmith-*")) == []  # torch leaves a folder of its own
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_offers_all_three_formats_its_own_first(recipe: str) -> None:
    composed = compose(recipe, (), config_folders(None))
    own = {"smollm2": "trtrtx", "smollm2-vllm": "checkpoint"}.get(recipe, "trtllm")
    assert next(iter(composed)) == own
    assert set(composed) == {"trtrtx", "trtllm", "checkpoint"}
    for name, (value, _) in composed.items():
        assert value.compiler.format == name


def test_a_chosen_compiler_is_the_only_one_rehearsed() -> None:
    assert list(compose("phi3", ["compiler=trtrtx"], config_folders(None))) == ["trtrtx"]


def test_a_wrong_recipe_is_not_rehearsed(tmp_path: Path) -> None:
    done, _ = _rehearse(tmp_path, "phi3", "compiler.max_batch_size=0")
    assert done.returncode == 2
    assert "compiler.max_batch_size" in done.stderr


def test_kept_folder_must_be_empty(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine").touch()
    done, _ = _rehearse(tmp_path, "phi3", "compiler=checkpoint", "--keep", "kept")
    assert done.returncode == 8
    assert "not empty" in done.stderr
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["mine"]


def test_plain_install_says_how_to_install_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def without_torch(name: str) -> object:
        return None if name in {"torch", "transformers"} else find_spec(name)

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", without_torch)
    with pytest.raises(IncompatibleError, match=r"needs torch, transformers.*'\.\[build\]'"):
        run_rehearsal("phi3", (), full_size=False, keep=tmp_path / "kept", config_dir=None)
    assert not (tmp_path / "kept").exists()
