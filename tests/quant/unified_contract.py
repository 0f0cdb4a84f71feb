"""The unified FP8 checkpoint, tensor by tensor, and recorded scales: equal under both sets.

The builder runs under today's packages and under those of the build image. The table says what the
checkpoint of each architecture holds, `golden/scales.json` the values of its scales; whichever set
runs the tests is compared with both. After a change of the tiny models or of calibration:

    python -m tests.quant.unified_contract
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.cache import StageCache
from pipeline.core.values import Checkpoint
from pipeline.quant.unified import UnifiedCheckpoint
from tests.architectures import ARCHITECTURES, tiny_architecture
from tests.quant.tiny_quantized import CALIBRATION, local_weights, tiny_quantizer

GOLDEN = Path(__file__).parent / "golden" / "scales.json"

_SPLIT = {
    "self_attn.q_proj": ("Q", "H"),
    "self_attn.k_proj": ("K", "H"),
    "self_attn.v_proj": ("K", "H"),
    "self_attn.o_proj": ("H", "Q"),
    "mlp.gate_proj": ("I", "H"),
    "mlp.up_proj": ("I", "H"),
    "mlp.down_proj": ("H", "I"),
}
_FUSED = {
    "self_attn.qkv_proj": ("Q+2K", "H"),
    "self_attn.o_proj": ("H", "Q"),
    "mlp.gate_up_proj": ("2I", "H"),
    "mlp.down_proj": ("H", "I"),
}
_BIASED = {"self_attn.q_proj": "Q", "self_attn.k_proj": "K", "self_attn.v_proj": "K"}
_LINEARS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "LlamaForCausalLM": _SPLIT,
    "MistralForCausalLM": _SPLIT,
    "Qwen2ForCausalLM": _SPLIT,
    "Phi3ForCausalLM": _FUSED,
}
"""Architecture -> linear of a layer -> shape [out, in]: H hidden, Q query heads, K key heads, I
intermediate."""

Form = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> dtype and shape."""


def expected_form(config: Mapping[str, Any]) -> Form:
    """Every tensor of the checkpoint of a model with this `config.json`, nothing kept."""
    (architecture,) = config["architectures"]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    query, key = heads * head_dim, config["num_key_value_heads"] * head_dim
    intermediate = config["intermediate_size"]
    size = {
        "H": hidden,
        "Q": query,
        "K": key,
        "I": intermediate,
        "Q+2K": query + 2 * key,
        "2I": 2 * intermediate,
    }
    vocabulary = ("bfloat16", (config["vocab_size"], hidden))
    form: Form = {
        "model.embed_tokens.weight": vocabulary,
        "model.norm.weight": ("bfloat16", (hidden,)),
    }
    if not config["tie_word_embeddings"]:
        form["lm_head.weight"] = vocabulary
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            form[f"{layer}.{norm}.weight"] = ("bfloat16", (hidden,))
        for linear, (rows, columns) in _LINEARS[architecture].items():
            form[f"{layer}.{linear}.weight"] = ("float8_e4m3fn", (size[rows], size[columns]))
            form[f"{layer}.{linear}.weight_scale"] = ("float32", ())
            form[f"{layer}.{linear}.input_scale"] = ("float32", ())
        for part in "kv":
            form[f"{layer}.self_attn.{part}_proj.{part}_scale"] = ("float32", ())
        if architecture == "Qwen2ForCausalLM":
            for linear, rows in _BIASED.items():
                form[f"{layer}.{linear}.bias"] = ("bfloat16", (size[rows],))
    return form


def form_of(checkpoint_dir: Path) -> Form:
    """What a checkpoint holds."""
    tensors = UnifiedCheckpoint(checkpoint_dir).tensors
    return {name: (entry.dtype, entry.shape) for name, entry in tensors.items()}


def scales_of(checkpoint_dir: Path) -> dict[str, float]:
    """All its scales."""
    checkpoint = UnifiedCheckpoint(checkpoint_dir)
    names = (name for name in checkpoint.tensors if name.endswith("_scale"))
    return {name: float(checkpoint.scalar(name)) for name in sorted(names)}


def source_sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 of the weights that a checkpoint was made from."""
    return hashlib.sha256((checkpoint.weights.dir / "model.safetensors").read_bytes()).hexdigest()


def architecture_checkpoint(root: Path, name: str, *keep_16bit: str) -> Checkpoint:
    """A tiny model of `tests.architectures`, quantized below `root`."""
    folder = root / name
    if not folder.exists():
        tiny_architecture(name, folder)
    weights = local_weights(folder)
    cache = StageCache(root=root / "cache")
    return tiny_quantizer(*keep_16bit).quantize(weights, CALIBRATION, cache)


def _record() -> Iterator[tuple[str, dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        for name in ARCHITECTURES:
            made = architecture_checkpoint(Path(folder), name)
            yield name, {"source": source_sha256(made), "scales": scales_of(made.dir)}


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(dict(_record()), indent=1) + "\n")
