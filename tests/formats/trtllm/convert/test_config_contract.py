"""config.json against the keys that TensorRT-LLM's classes read (trtllm_config_keys.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.architectures import ARCHITECTURES
from tests.formats.trtllm.convert.conftest import Convert

KEYS = json.loads(Path(__file__).with_name("trtllm_config_keys.json").read_text())
CLASS = {
    "LlamaForCausalLM": "LLaMAConfig",
    "MistralForCausalLM": "LLaMAConfig",
    "Qwen2ForCausalLM": "QWenConfig",
    "Phi3ForCausalLM": "Phi3Config",
}
"""Source: `MODEL_MAP` in models/__init__.py of NVIDIA/TensorRT-LLM, index number 820782731."""


def read_keys(config: dict[str, Any]) -> set[str]:
    """Every key that TensorRT-LLM looks at for this architecture."""
    name = CLASS[config["architecture"]]
    return {
        *KEYS["classes"]["PretrainedConfig"],
        *KEYS["classes"][name],
        *KEYS["beside"]["all"],
        *KEYS["beside"].get(name, {}),
    }


def written(converted: Convert, name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((converted(name).dir / "config.json").read_text())
    return config


LONGROPE = {
    "longrope_scaling_short_factors",
    "longrope_scaling_long_factors",
    "original_max_position_embeddings",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_key_that_is_read_is_written_or_neutral(converted: Convert, name: str) -> None:
    config = written(converted, name)
    absent = set() if config["position_embedding_type"] == "long_rope" else LONGROPE
    wanted = read_keys(config) - KEYS["neutral"].keys() - absent
    assert config.keys() == wanted


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    ("section", "class_name"), [("quantization", "QuantConfig"), ("mapping", "Mapping")]
)
def test_sections_have_no_unknown_key_and_leave_out_neutral_ones_only(
    converted: Convert, name: str, section: str, class_name: str
) -> None:
    known = set(KEYS["classes"][class_name])
    assert written(converted, name)[section].keys() == known - KEYS["neutral"].keys()
