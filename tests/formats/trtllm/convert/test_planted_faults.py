"""What a wrong converter would write does not pass the round trip: the proof can fail.

Each case damages a converted checkpoint in one way. The reference then fails as TensorRT-LLM would,
or its logits leave the bound.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.formats.trtllm.convert.checkpoints import Converted, edited, reconfigured
from tests.formats.trtllm.convert.comparison import (
    LOGIT_BOUND,
    ROUNDED_BOUND,
    largest_difference,
    relative_difference,
    transformers_logits,
)
from tests.formats.trtllm.convert.conftest import Convert
from tests.formats.trtllm.convert.reference import TrtLlmReference

if TYPE_CHECKING:
    from tests.formats.trtllm.convert.checkpoints import Tensors

_LAYER = "transformer.layers.1"
_TENFOLD = 10 * LOGIT_BOUND


def passes(found: Converted, damaged: Path) -> bool:
    """Whether the round trip would accept the damaged checkpoint."""
    window = found.record["attention_window"]
    try:
        ours = TrtLlmReference(damaged, round_activations=False, window=window)
        theirs = transformers_logits(found.unified, round_activations=False)
        return largest_difference(ours, theirs) < _TENFOLD
    except (RuntimeError, AssertionError, KeyError, TypeError, ValueError):
        return False


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama3.1", "rotary_base"),
        ("qwen2.5", "rotary_base"),
        ("llama3.1", "rotary_scaling"),
        ("phi4-mini", "rotary_pct"),
        ("llama", "position_embedding_type"),
        ("phi3-long", "position_embedding_type"),
        ("phi3-long", "longrope_scaling_long_factors"),
        ("phi4-mini", "original_max_position_embeddings"),
        ("llama", "num_key_value_heads"),
        ("llama", "intermediate_size"),
        ("phi3", "hidden_act"),
        ("llama", "vocab_size"),
        ("llama", "quantization"),
    ],
)
def test_key_that_is_left_out_is_noticed(
    converted: Convert, tmp_path: Path, name: str, key: str
) -> None:
    found = converted(name)
    damaged = reconfigured(found.dir, tmp_path / "damaged", lambda config: config.pop(key))
    assert not passes(found, damaged)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attn_bias", True),
        ("rotary_scaling", {"type": "llama3", "factor": 4.0}),
    ],
    ids=str,
)
def test_wrong_value_is_noticed(converted: Convert, tmp_path: Path, key: str, value: Any) -> None:
    found = converted("llama3.1")
    damaged = reconfigured(
        found.dir, tmp_path / "damaged", lambda config: config.update({key: value})
    )
    assert not passes(found, damaged)


def _swap_k_and_v(tensors: Tensors) -> None:
    """Four query and two key heads of 16."""
    import torch

    name = f"{_LAYER}.attention.qkv.weight"
    q, k, v = torch.split(tensors[name].view(torch.uint8), [64, 32, 32])
    tensors[name] = torch.cat([q, v, k]).view(torch.float8_e4m3fn)


def _swap_halves(tensors: Tensors) -> None:
    import torch

    name = f"{_LAYER}.mlp.fc.weight"
    first, second = tensors[name].view(torch.uint8).chunk(2)
    tensors[name] = torch.cat([second, first]).view(torch.float8_e4m3fn)


def _swap_gate_and_up(tensors: Tensors) -> None:
    fc, gate = f"{_LAYER}.mlp.fc.weight", f"{_LAYER}.mlp.gate.weight"
    tensors[fc], tensors[gate] = tensors[gate], tensors[fc]


def _drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def _scale(name: str, factor: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name] * factor})


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("llama", _swap_k_and_v),
        ("llama", _swap_gate_and_up),
        ("phi3", _swap_halves),
        ("qwen2.5", _scale(f"{_LAYER}.attention.qkv.bias", 0.0)),
        ("llama", _drop("lm_head.weight")),
        ("llama", _drop(f"{_LAYER}.attention.kv_cache_scaling_factor")),
        ("llama", _drop(f"{_LAYER}.mlp.proj.activation_scaling_factor")),
        ("llama", _scale(f"{_LAYER}.mlp.proj.weights_scaling_factor", 1.01)),
        ("llama", _scale(f"{_LAYER}.post_layernorm.weight", 1.01)),
    ],
)
def test_wrong_tensor_is_noticed(
    converted: Convert, tmp_path: Path, name: str, edit: Callable[[Tensors], object]
) -> None:
    found = converted(name)
    assert not passes(found, edited(found.dir, tmp_path / "damaged", edit))


@pytest.mark.parametrize("linear", ["attention.qkv", "mlp.proj"])
@pytest.mark.parametrize("factor", [0.5, 1.1])
def test_wrong_activation_scale_is_noticed(
    converted: Convert, tmp_path: Path, linear: str, factor: float
) -> None:
    found = converted("llama")

    def edit(tensors: Tensors) -> None:
        for layer in range(3):
            tensors[f"transformer.layers.{layer}.{linear}.activation_scaling_factor"] *= factor

    damaged = edited(found.dir, tmp_path / "damaged", edit)
    ours = TrtLlmReference(damaged, round_activations=True)
    theirs = transformers_logits(found.unified, round_activations=True)
    assert relative_difference(ours, theirs) > ROUNDED_BOUND
