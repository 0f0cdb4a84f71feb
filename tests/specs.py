"""Model specs for tests: those of the shipped recipes, and a tiny Llama that tests change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from pipeline.model.read import load_config, read_spec
from pipeline.model.spec import ModelSpec

ROOT = Path(__file__).parents[1]
CONFIGS = Path(__file__).parent / "model" / "configs"
"""Public config.json files, keys and values as their repositories have them."""
NOT_FOR_TRTLLM = ("gemma3", "ministral3-8b", "phi3-w4", "smollm2-w4")
"""Recipes of models and precisions that its engines cannot express."""

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def tiny_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """The tiny config as another family states it; `...` removes a key."""
    architecture = f"{model_type.capitalize()}ForCausalLM"
    config = {**TINY, "model_type": model_type, "architectures": [architecture], **changes}
    return {key: value for key, value in config.items() if value is not ...}


def tiny_spec(model_type: str = "llama", **changes: Any) -> ModelSpec:
    """The spec of `tiny_config`."""
    return read_spec(tiny_config(model_type, **changes))


def published(name: str, **changes: Any) -> dict[str, Any]:
    """A public config.json; `...` removes a key."""
    config = {**json.loads((CONFIGS / f"{name}.json").read_text()), **changes}
    return {key: value for key, value in config.items() if value is not ...}


def shape(name: str) -> ModelSpec:
    """One of recipes/shapes."""
    return read_spec(yaml.safe_load((ROOT / "recipes" / "shapes" / f"{name}.yaml").read_text()))


def spec_of_folder(folder: Path) -> ModelSpec:
    """The spec of a model folder."""
    return read_spec(load_config(folder))
