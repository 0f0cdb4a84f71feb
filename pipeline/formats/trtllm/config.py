"""The `config.json` of a TensorRT-LLM 1.2 checkpoint.

TensorRT-LLM gives most keys a default and says nothing when one is missing, so a checkpoint without
`rotary_base` builds and runs, with the wrong rotary embedding. Hence every key whose default could
be wrong for some model is written, also where the default happens to be right.

Sources, all of NVIDIA/TensorRT-LLM. Where the public index of file versions tells no commit, its
index number is given: `models/modeling_utils.py` (b35ac1b6), `models/llama/config.py` (89fd9b74)
and `model.py` (#663997685), `models/qwen/config.py` (373970a8) and `model.py` (#984454274),
`models/phi3/config.py` (1e6a4f97) and `model.py` (c4dc529f), `layers/attention.py` (#1178835378),
`mapping.py` (b35ac1b6, which is 1.2.0rc2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from pipeline.core.errors import Fault, RecipeError
from pipeline.model.spec import (
    Layer,
    Llama3Scaling,
    LongRopeScaling,
    ModelSpec,
    longrope_gain,
    not_built,
)

Dtype = Literal["bfloat16", "float16"]
"""Type of activations and of every tensor that is not FP8."""

_QWEN_SEQ_LENGTH = 8192
"""`seq_length` scales attention only where `use_logn_attn` is on; the layer reads it regardless.
The value is the one that TensorRT-LLM's own conversion falls back to (`models/qwen/config.py`)."""


def trtllm_config(
    spec: ModelSpec,
    *,
    dtype: Dtype,
    kv_fp8: bool,
    exclude: Sequence[str],
) -> dict[str, Any]:
    """Everything that TensorRT-LLM needs to know about the model, beside its weights.

    `exclude` names the linears that are not FP8 in TensorRT-LLM's words, lm_head among them; with
    `kv_fp8` the weights must hold scales of the cache.

    Raises:
        RecipeError: TensorRT-LLM's class for this architecture would silently ignore something
            that this model needs.
    """
    if spec.architecture not in _FAMILIES:
        message = f"is {spec.architecture}; the converter for TensorRT-LLM has "
        raise RecipeError([not_built("architectures", message + ", ".join(_FAMILIES))])
    layer = spec.uniform_layer()
    if faults := list(_faults(spec, layer)):
        raise RecipeError(faults)
    attention = layer.attention
    return {
        "architecture": spec.architecture,
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": layer.linear("gate").rows,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_size": attention.head_dim,
        "qk_layernorm": False,
        # Phi-3 has one fused matrix, whose activation splits its output: the second half gates.
        "hidden_act": "swiglu" if layer.fused_mlp else "silu",
        "norm_epsilon": spec.norm_eps,
        "max_position_embeddings": spec.max_position_embeddings,
        **_rope(spec),
        **_FAMILIES[spec.architecture],
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1, "cp_size": 1},
        # An unknown key in here is an error, not a warning.
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8" if kv_fp8 else None,
            "exclude_modules": list(exclude),
        },
    }


def _rope(spec: ModelSpec) -> dict[str, Any]:
    """Rotary settings; `rotary_scaling` is null for the plain embedding, as no type is `default`.

    A scaling's type is read from `type`, else from `rope_type`; both are written, since older
    readers know one of them only. LongRoPE goes through keys of its own, which change the layers;
    `position_embedding_type` changes the tables: one without the other is an assertion at best.
    """
    rope, head_dim = spec.rope, spec.layers[0].attention.head_dim
    share = rope.rotary_dim / head_dim
    if int(head_dim * share) < rope.rotary_dim:  # which is how TensorRT-LLM computes our size
        share = math.nextafter(share, math.inf)
    keys: dict[str, Any] = {
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": rope.theta,
        "rotary_pct": share,
        "rotary_embedding_dim": rope.rotary_dim,
        "rotary_scaling": None,
    }
    scaling = rope.scaling
    if isinstance(scaling, Llama3Scaling):
        keys["rotary_scaling"] = {"type": "llama3", "rope_type": "llama3", **asdict(scaling)}
    elif isinstance(scaling, LongRopeScaling):
        keys |= {
            "position_embedding_type": "long_rope",
            "longrope_scaling_short_factors": list(scaling.short_factors),
            "longrope_scaling_long_factors": list(scaling.long_factors),
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return keys


_LLAMA = {"attn_bias": False, "mlp_bias": False}
_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,  # built by the Llama class
    "Qwen2ForCausalLM": {
        "attn_bias": True,
        "mlp_bias": False,
        "qwen_type": "qwen2",
        "seq_length": _QWEN_SEQ_LENGTH,
        "use_logn_attn": False,
    },
    "Phi3ForCausalLM": {},  # its layer has no biases to switch
}
"""Model classes of TensorRT-LLM that we convert for, and the keys that only their config has."""


def _faults(spec: ModelSpec, layer: Layer) -> Iterator[Fault]:
    """What the layers of TensorRT-LLM's class would silently ignore.

    The Llama and Qwen layers rotate whole heads and know no LongRoPE. The Phi-3 layer ignores
    `head_size` and `rotary_scaling`, and computes its own LongRoPE gain: sqrt(1 + ln(f) /
    ln(original)), f = max_position_embeddings / original
    (`create_sinusoidal_positions_long_rope_for_attention_plugin` in `functional.py`); the keys
    `longrope_short_mscale` and `longrope_long_mscale` are read for Phi-3-small and PhiMoE only.
    """
    attention, rope, scaling = layer.attention, spec.rope, spec.rope.scaling
    head_dim, longest = attention.head_dim, spec.max_position_embeddings
    if not layer.fused_mlp:
        if rope.rotary_dim != head_dim:
            message = f"rotates {rope.rotary_dim} of {head_dim} elements; TensorRT-LLM's "
            message += f"{spec.architecture} rotates all"
            yield not_built("partial_rotary_factor", message)
        if isinstance(scaling, LongRopeScaling):
            message = f"is longrope, which its {spec.architecture} does not have"
            yield not_built("rope_type", message)
        return
    if head_dim * attention.heads != spec.hidden_size:
        message = f"is {head_dim}; TensorRT-LLM's Phi3ForCausalLM takes hidden_size / "
        message += f"num_attention_heads = {spec.hidden_size / attention.heads:g} instead"
        yield not_built("head_dim", message)
    if isinstance(scaling, Llama3Scaling):
        yield not_built("rope_type", "is llama3, which its Phi3ForCausalLM ignores")
    if isinstance(scaling, LongRopeScaling):
        original = scaling.original_max_position_embeddings
        gain = longrope_gain(longest / original, original)
        if not math.isclose(gain, scaling.attention_factor, rel_tol=1e-6):
            message = f"is {scaling.attention_factor:g}; TensorRT-LLM computes {gain:g} from "
            message += "max_position_embeddings and takes no other"
            yield not_built("attention_factor", message)
