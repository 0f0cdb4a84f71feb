"""Random models are complete Hugging Face folders of the shape that was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.model.hf import load_model, load_tokenizer
from pipeline.model.random_model import config_of_shape, write_random_model
from pipeline.model.shapes import ModelShape, shape_faults
from pipeline.model.shrink import CONTEXT, small_shape
from pipeline.sources.text.topics import PydocTopics

ROOT = Path(__file__).parents[2]
SHAPES = sorted(path.stem for path in (ROOT / "recipes" / "shapes").glob("*.yaml"))


def _shape(name: str) -> ModelShape:
    import yaml

    fields = yaml.safe_load((ROOT / "recipes" / "shapes" / f"{name}.yaml").read_text())
    fields.pop("_target_")
    return ModelShape(**fields)


@pytest.mark.parametrize("name", SHAPES)
def test_config_reads_back_as_the_same_shape(name: str) -> None:
    for shape in (_shape(name), small_shape(_shape(name))):
        assert shape_faults(shape, config_of_shape(shape)) == []


@pytest.mark.parametrize("name", SHAPES)
def test_small_shape_keeps_what_a_converter_can_get_wrong(name: str) -> None:
    real, small = _shape(name), small_shape(_shape(name))
    for field in ("architecture", "tie_word_embeddings", "attention_bias", "rope_type"):
        assert getattr(small, field) == getattr(real, field)
    ratio = real.num_attention_heads // real.num_key_value_heads
    assert small.num_attention_heads == ratio * small.num_key_value_heads
    assert (small.sliding_window is None) == (real.sliding_window is None)
    if small.sliding_window is not None:
        assert small.sliding_window < CONTEXT
    assert small.params < 3_000_000


def test_longrope_shape_gets_factors_for_every_frequency() -> None:
    longrope = ModelShape(
        architecture="Phi3ForCausalLM",
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=96,
        vocab_size=32064,
        max_position_embeddings=131072,
        rope_theta=10000.0,
        rope_type="longrope",
        original_max_position_embeddings=4096,
    )
    small = small_shape(longrope)
    scaling = config_of_shape(small)["rope_scaling"]
    assert len(scaling["long_factor"]) == len(scaling["short_factor"]) == small.head_dim // 2
    assert shape_faults(small, config_of_shape(small)) == []


@pytest.mark.parametrize("name", ["phi3", "qwen2.5", "smollm2"])
def test_transformers_finds_every_tensor_and_no_other(name: str, tmp_path: Path) -> None:
    shape = small_shape(_shape(name))
    write_random_model(
        shape, tmp_path, documents=list(PydocTopics(part="calibrate").documents()), seed=0
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    model = load_model(tmp_path, "float32")
    wanted = {parameter for parameter, _ in model.named_parameters()}
    assert set(index) == wanted
    assert sum(p.numel() for p in model.parameters()) == shape.params
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("A small engine.")) == "A small engine."


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    shape = small_shape(_shape("smollm2"))
    written = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / folder).mkdir()
        write_random_model(shape, tmp_path / folder, documents=["abc def"], seed=seed)
        written.append((tmp_path / folder / "model-00001-of-00001.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]
