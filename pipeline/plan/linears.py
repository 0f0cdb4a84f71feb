"""The linears of a model by their Hugging Face names, and the patterns that pick some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from pipeline.core.errors import Fault
from pipeline.model.shapes import ModelShape

_FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
"""Linears that runtimes merge into one GEMM, which has one precision. vLLM refuses a mixture
("Detected some but not all shards of ... are quantized"); TensorRT-LLM stores q/k/v as one tensor.
"""


def linear_modules(shape: ModelShape) -> dict[str, int]:
    """Module name -> number of weights of every linear in the layers; lm_head is not among them.

    The names are those of the Transformers module, so Phi-3 has its fused `qkv_proj` and
    `gate_up_proj`.
    """
    query = shape.num_attention_heads * shape.head_dim
    key_value = shape.num_key_value_heads * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size
    if shape.architecture == "Phi3ForCausalLM":
        layer = {
            "self_attn.qkv_proj": hidden * (query + 2 * key_value),
            "self_attn.o_proj": query * hidden,
            "mlp.gate_up_proj": hidden * 2 * inner,
            "mlp.down_proj": inner * hidden,
        }
    else:
        layer = {
            "self_attn.q_proj": hidden * query,
            "self_attn.k_proj": hidden * key_value,
            "self_attn.v_proj": hidden * key_value,
            "self_attn.o_proj": query * hidden,
            "mlp.gate_proj": hidden * inner,
            "mlp.up_proj": hidden * inner,
            "mlp.down_proj": inner * hidden,
        }
    return {
        f"model.layers.{index}.{name}": params
        for index in range(shape.num_hidden_layers)
        for name, params in layer.items()
    }


def select(patterns: Sequence[str], modules: Mapping[str, int]) -> tuple[str, ...]:
    """Names of the modules that match any pattern (fnmatch, case matters), in model order."""
    return tuple(
        name for name in modules if any(fnmatchcase(name, pattern) for pattern in patterns)
    )


def keep_16bit_faults(patterns: Sequence[str], modules: Mapping[str, int]) -> list[Fault]:
    """Patterns that match nothing, and choices that split what every runtime fuses."""
    faults = [
        Fault(
            f"quantizer.keep_16bit[{index}]",
            f"{pattern!r} matches no linear of this model; names look like "
            f"{next(iter(modules))} (lm_head always stays 16-bit)",
        )
        for index, pattern in enumerate(patterns)
        if not select([pattern], modules)
    ]
    kept = set(select(patterns, modules))
    for layer in dict.fromkeys(name.rsplit(".", 2)[0] for name in modules):
        for group in _FUSED:
            names = [name for leaf in group if (name := f"{layer}.{leaf}") in modules]
            split = [name for name in names if name in kept]
            if split and len(split) < len(names):
                # One is enough: a pattern that splits one layer splits all of them.
                return [*faults, _split_fault(split[0], [n for n in names if n not in kept])]
    return faults


def _split_fault(kept: str, quantized: Sequence[str]) -> Fault:
    return Fault(
        "quantizer.keep_16bit",
        f"{kept} would stay 16-bit and {', '.join(quantized)} become FP8; runtimes merge them "
        "into one GEMM, which has one precision: keep all of them or none",
    )
