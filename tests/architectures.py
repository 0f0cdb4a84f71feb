"""Tiny random models of every architecture that the converters build: real files, no download.

Each is the shape of a published model with smaller sizes: the same ratio of query to key heads, the
same fusions, biases, ties, windows and rope settings. Norms and biases are random, so that a
forgotten one shows; a fresh model has ones and zeros there. All have four query heads or more and
heads of 16 elements or more, since TensorRT-RTX has no attention kernel for fewer.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import pytest

from pipeline.model.hf import quiet
from tests.tiny import VOCAB_SIZE, tiny_tokenizer

WINDOW: Final = 24
"""Sliding window of `mistral-sliding` and `phi3`: keys that a query sees, its own included."""
ORIGINAL_CONTEXT: Final = 64
"""`original_max_position_embeddings` of the scaled rope settings, tokens."""

_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def llama3_rope(factor: float) -> dict[str, Any]:
    """With 16-element heads and theta 500000: one frequency kept, one blended, six divided."""
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
    }


def longrope(frequencies: int) -> dict[str, Any]:
    """Short factors near 1, long ones growing to 8, as in the published configs."""
    last = frequencies - 1
    return {
        "type": "longrope",
        "short_factor": [1.0 + 0.4 * i / last for i in range(frequencies)],
        "long_factor": [1.1 + 7.0 * i / last for i in range(frequencies)],
    }


def yarn(**changes: Any) -> dict[str, Any]:
    """Ministral 3's rope settings, for a short original context."""
    return {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 16.0,
        "original_max_position_embeddings": 40,
        "max_position_embeddings": 256,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.5,
        **changes,
    }


_MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 16}),
    "llama3.1": ("Llama", {"head_dim": 16, "rope_theta": 5e5, "rope_scaling": llama3_rope(8.0)}),
    "llama3.2": (
        "Llama",
        {
            "head_dim": 16,
            "rope_theta": 5e5,
            "rope_scaling": llama3_rope(32.0),
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("Mistral", {"rope_theta": 1e6, "sliding_window": None}),
    "mistral-sliding": ("Mistral", {"sliding_window": WINDOW}),
    # Seven query heads to a key head, as in Qwen2.5-7B.
    "qwen2.5": (
        "Qwen2",
        {
            "hidden_size": 224,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
        },
    ),
    "qwen2.5-0.5b": (
        "Qwen2",
        {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    ),
    # Heads of 32, more than hidden_size / heads, as in Qwen3-4B.
    "qwen3": (
        "Qwen3",
        {"head_dim": 32, "rope_theta": 5e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    ),
    # Heads of 96, one key head to a query head, as in Phi-3-mini.
    "phi3": (
        "Phi3",
        {
            "hidden_size": 384,
            "num_key_value_heads": 4,
            "original_max_position_embeddings": 256,
            "sliding_window": WINDOW,
        },
    ),
    "phi3-long": (
        "Phi3",
        {
            "hidden_size": 384,
            "num_key_value_heads": 4,
            "original_max_position_embeddings": ORIGINAL_CONTEXT,
            "rope_scaling": longrope(48),
            "sliding_window": 262144,
        },
    ),
    "ministral3": ("Ministral3", {"head_dim": 32, "rope_parameters": yarn()}),
    # Layer by layer another window and base; 16 x 4 heads beside 64 features of the residual.
    "gemma3": (
        "Gemma3",
        {
            "num_key_value_heads": 1,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 2,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        },
    ),
    # Heads of 32, of which 24 elements are rotated; three query heads to a key head.
    "phi4-mini": (
        "Phi3",
        {
            "hidden_size": 192,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "original_max_position_embeddings": ORIGINAL_CONTEXT,
            "partial_rotary_factor": 0.75,
            "rope_scaling": longrope(12),
            "sliding_window": 262144,
            "tie_word_embeddings": True,
        },
    ),
}

_TOO_NEW = {"ministral3"} if int(version("transformers").split(".")[0]) < 5 else set()
"""What the Transformers of the build image does not know."""
ARCHITECTURES: Final = tuple(name for name in _MODELS if name not in _TOO_NEW)
"""Names that `tiny_architecture` knows."""
TRTLLM_ARCHITECTURES: Final = tuple(sorted(_MODELS.keys() - {"gemma3", "ministral3"}))
"""Those that are converted for TensorRT-LLM."""


def covering(names: Iterable[str], kept: Container[str]) -> list[Any]:
    """Parameters of a test: `make test` and `make test-all` have the `kept`, the soak the rest."""
    return [pytest.param(name, marks=() if name in kept else pytest.mark.product) for name in names]


def tiny_architecture(name: str, folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write config, bfloat16 safetensors, tokenizer, chat template and licence into `folder`.

    Args:
        name: One of `ARCHITECTURES`.
        folder: Made when it is missing.
        seed: Of the random weights.
        overrides: Fields of the model's Transformers config, spelled as in Transformers 4.
    """
    import torch
    import transformers

    family, fields = _MODELS[name]
    settings = {**_COMMON, **fields, **overrides}
    # The same spread of logits, and so the same float32 rounding in them, whatever the width.
    settings.setdefault("initializer_range", 1.2 / settings["hidden_size"] ** 0.5)
    with quiet():
        kind = {"Gemma3": "Gemma3Text"}.get(family, family)
        config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.config.architectures = [f"{family}ForCausalLM"]
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5).sub_(float(family == "Gemma3"))
            elif parameter_name.endswith(".bias"):
                parameter.normal_(0.0, 0.5)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("Apache License 2.0\n")
    return folder


_INPUT_SCALES: Mapping[str, float] = {"o_proj": 0.005, "down_proj": 0.01}
_INPUT_SCALE = 0.011  # of what a norm gives: up to 4.9


def tiny_fp8_architecture(
    name: str,
    folder: Path,
    *,
    seed: int = 0,
    keep_16bit: Collection[str] = (),
    **overrides: Any,
) -> Path:
    """Write `tiny_architecture` as a unified FP8 checkpoint, without ModelOpt.

    Weight scales are amax / 448 of each tensor, so those of q, k and v differ; input scales are
    made up. Linears in `keep_16bit` stay bfloat16.
    """
    import torch
    from safetensors.torch import load_file, save_file

    tiny_architecture(name, folder, seed=seed, **overrides)
    shard = folder / "model.safetensors"
    tensors = load_file(shard)
    for weight_name in [key for key in tensors if key.endswith("_proj.weight")]:
        module = weight_name.removesuffix(".weight")
        if module in keep_16bit:
            continue
        weight = tensors[weight_name].float()
        scale = weight.abs().max() / 448
        tensors[weight_name] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{module}.weight_scale"] = scale
        kind = module.rpartition(".")[2]
        tensors[f"{module}.input_scale"] = torch.tensor(_INPUT_SCALES.get(kind, _INPUT_SCALE))
    save_file(tensors, shard, metadata={"format": "pt"})
    return folder
