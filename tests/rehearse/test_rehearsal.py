"""Every shipped recipe is rehearsed: the whole line, all three formats, on small random models."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.compose import config_folders
from pipeline.core.errors import IncompatibleError, RecipeError
from pipeline.model.hf import load_model, load_tokenizer, write_random_model
from pipeline.model.read import read_spec
from pipeline.model.spec import LongRopeScaling
from pipeline.registry.manifest import manifest_at
from pipeline.registry.package import require_manifest_publishable
from pipeline.registry.stores.folder import FolderRegistry
from pipeline.rehearse import CONTEXT, compose, run_rehearsal, small_spec
from pipeline.sources.text.topics import PydocTopics
from tests.architectures import covering
from tests.specs import NOT_FOR_TRTLLM, published, shape
from tests.tiny_recipe import ROOT, enginesmith

SHAPES = sorted(path.stem for path in (ROOT / "recipes" / "shapes").glob("*.yaml"))
ONE_OF_A_KIND = {
    *("gemma3", "llama3.1", "ministral3-8b", "mistral", "phi3", "qwen2.5", "qwen3-4b"),
    "smollm2-w4",
}
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def _rehearse(
    folder: Path, *arguments: str, **env: str
) -> tuple[subprocess.CompletedProcess[str], Any]:
    """`enginesmith rehearse ARGUMENTS --json` in an empty folder, with no tool on the PATH."""
    env = {"PATH": str(folder), "HOME": str(folder), **env}
    done = enginesmith(folder, "rehearse", *arguments, "--json", **env)
    return done, json.loads(done.stdout) if done.stdout.startswith("{") else None


@pytest.mark.slow
@pytest.mark.parametrize("recipe", covering(RECIPES, ONE_OF_A_KIND))
def test_every_recipe_is_rehearsed_in_every_format(recipe: str, tmp_path: Path) -> None:
    done, result = _rehearse(tmp_path, recipe, "--keep", "kept")
    assert done.returncode == 0, done.stderr
    states = {entry["format"]: entry["state"] for entry in result["formats"]}
    stopped = {} if recipe in NOT_FOR_TRTLLM else {"trtllm": "stopped"}
    assert states == {**stopped, "trtrtx": "good", "checkpoint": "good"}
    for trtllm in (entry for entry in result["formats"] if entry["format"] == "trtllm"):
        assert "not run: trtllm-build --checkpoint_dir" in trtllm["detail"]
    assert not (tmp_path / "artifacts").exists()
    assert "Publish" not in done.stderr
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
def test_a_recipe_offers_every_format_it_may_have_its_own_first(recipe: str) -> None:
    composed = compose(recipe, (), config_folders(None))
    own = dict.fromkeys(["smollm2", *NOT_FOR_TRTLLM], "trtrtx")
    own |= dict.fromkeys(["smollm2-vllm", "phi3-w4"], "checkpoint")
    assert next(iter(composed)) == own.get(recipe, "trtllm")
    every = {"trtrtx", "trtllm", "checkpoint"}
    assert set(composed) == (every - {"trtllm"} if recipe in NOT_FOR_TRTLLM else every)
    for name, (value, _) in composed.items():
        assert value.compiler.format == name
    # A chosen one is the only one.
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


@pytest.mark.parametrize("name", SHAPES)
def test_small_spec_keeps_what_a_converter_can_get_wrong(name: str) -> None:
    real, small = shape(name), small_spec(shape(name))
    assert (small.architecture, small.tied) == (real.architecture, real.tied)
    ours, theirs = small.layers[0], real.layers[0]
    assert type(ours.attention.rope.scaling) is type(theirs.attention.rope.scaling)
    for kept in ("role", "module", "bias", "fused"):
        assert [getattr(linear, kept) for linear in ours.linears] == [
            getattr(linear, kept) for linear in theirs.linears
        ]
    assert ours.attention.heads * theirs.attention.kv_heads == (
        theirs.attention.heads * ours.attention.kv_heads
    )
    assert (small.window is None) == (real.window is None)
    assert small.window is None or small.window < CONTEXT
    assert small.params < 3_000_000


def test_small_longrope_has_factors_for_every_frequency_in_either_spelling() -> None:
    config = published("phi-4-mini-instruct")
    rope = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    for spelled in (published("phi-4-mini-instruct"), {**config, "rope_parameters": rope}):
        scaling = small_spec(read_spec(spelled)).layers[0].attention.rope.scaling
        assert isinstance(scaling, LongRopeScaling)
        assert len(scaling.long_factors) == 32 * 3 // 4 // 2


@pytest.mark.parametrize("name", ["phi3", "qwen2.5", "smollm2"])
def test_transformers_finds_every_tensor_and_no_other(name: str, tmp_path: Path) -> None:
    spec = small_spec(shape(name))
    write_random_model(
        spec, tmp_path, documents=list(PydocTopics(part="calibrate").documents()), seed=0
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    model = load_model(tmp_path, "float32")
    wanted = {parameter for parameter, _ in model.named_parameters()}
    assert set(index) == wanted
    assert sum(p.numel() for p in model.parameters()) == spec.params
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("A small engine.")) == "A small engine."


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    spec = small_spec(shape("smollm2"))
    written = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / folder).mkdir()
        write_random_model(spec, tmp_path / folder, documents=["abc def"], seed=seed)
        written.append((tmp_path / folder / "model-00001-of-00001.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]
