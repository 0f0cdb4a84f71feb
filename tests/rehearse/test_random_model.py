"""Random models are complete Hugging Face folders of the shape that was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.model.hf import load_model, load_tokenizer, write_random_model
from pipeline.model.read import read_spec
from pipeline.model.spec import LongRopeScaling
from pipeline.rehearse.shrink import CONTEXT, small_spec
from pipeline.sources.text.topics import PydocTopics
from tests.specs import published, shape

ROOT = Path(__file__).parents[2]
SHAPES = sorted(path.stem for path in (ROOT / "recipes" / "shapes").glob("*.yaml"))


@pytest.mark.parametrize("name", SHAPES)
def test_small_spec_keeps_what_a_converter_can_get_wrong(name: str) -> None:
    real, small = shape(name), small_spec(shape(name))
    assert (small.architecture, small.tied) == (real.architecture, real.tied)
    assert type(small.rope.scaling) is type(real.rope.scaling)
    ours, theirs = small.layers[0], real.layers[0]
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
        scaling = small_spec(read_spec(spelled)).rope.scaling
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
