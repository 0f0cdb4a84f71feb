"""A decoder in plain PyTorch, by TensorRT-LLM's conventions: what an engine would compute.

It reads `config.json` and `rank0.safetensors` and nothing else. Where a key or a tensor is missing
it does what TensorRT-LLM 1.2 does: take the silent default, or fail. So a key that the converter
forgets shows as other logits or as an exception, as it would on a GPU.

Sources, NVIDIA/TensorRT-LLM (index numbers where the index tells no commit): defaults from
`models/modeling_utils.py` b35ac1b6, `models/llama/config.py` 89fd9b74, `models/qwen/config.py`
373970a8, `models/phi3/config.py` 1e6a4f97; which of them a layer uses from `models/llama/model.py`
#663997685, `models/qwen/model.py` #984454274, `models/phi3/model.py` c4dc529f; rotary tables from
`layers/attention.py` #1178835378 and `functional.py` #57079567367. Two things are simpler than
there: scales stay float32, and LongRoPE's factors are chosen by the length of the sequence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    Logits = Callable[[torch.Tensor], torch.Tensor]

_LLAMA_DEFAULTS = {
    "attn_bias": False,
    "mlp_bias": False,
    "rotary_base": 10000.0,
    "rotary_scaling": None,
}


_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _LLAMA_DEFAULTS,
    "MistralForCausalLM": _LLAMA_DEFAULTS,
    "Qwen2ForCausalLM": {**_LLAMA_DEFAULTS, "attn_bias": True, "use_logn_attn": False},
    "Qwen3ForCausalLM": {**_LLAMA_DEFAULTS, "attn_bias": True, "use_logn_attn": False},
    "Phi3ForCausalLM": {"rotary_base": 10000.0, "rotary_scaling": None},
}


class TrtLlmReference:
    """One sequence at a time, without a cache.

    Args:
        folder: A TensorRT-LLM checkpoint.
        round_activations: Round the inputs of FP8 linears to E4M3, as the engine does.
        window: `max_attention_window` of the runtime; None for none.
    """

    def __init__(
        self,
        folder: Path,
        *,
        round_activations: bool,
        window: int | None = None,
    ) -> None:
        from safetensors.torch import load_file

        self.config = self._with_defaults(json.loads((folder / "config.json").read_text()))
        self._weights = load_file(folder / "rank0.safetensors")
        self._round_activations = round_activations
        self._window = window
        quantization = self.config["quantization"]
        self._fp8 = quantization.get("quant_algo") == "FP8"
        self._excluded = quantization.get("exclude_modules") or ["lm_head"]
        self._check_tensors()

    @staticmethod
    def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
        """What `PretrainedConfig` and its subclass fill in without a word."""
        config = {
            "vocab_size": None,
            "hidden_act": "gelu",
            "norm_epsilon": 1e-5,
            "position_embedding_type": "learned_absolute",
            "max_position_embeddings": None,
            "quantization": {},
            **_DEFAULTS[config["architecture"]],
            **config,
        }
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        config.setdefault("num_key_value_heads", heads)
        config.setdefault("intermediate_size", 4 * hidden)
        config.setdefault("head_size", hidden // heads)
        return config

    @property
    def _phi3(self) -> bool:
        return bool(self.config["architecture"] == "Phi3ForCausalLM")

    @property
    def _qk_norm(self) -> bool:
        """Qwen's layer does not read `qk_layernorm`."""
        return self.config.get("qwen_type") == "qwen3"

    @property
    def _head_size(self) -> int:
        """Phi-3's layer does not read `head_size`."""
        config = self.config
        if self._phi3:
            return int(config["hidden_size"] // config["num_attention_heads"])
        return int(config["head_size"])

    def _check_tensors(self) -> None:
        """Every parameter must be there in its shape; lm_head may silently be the embedding."""
        c, wanted = self.config, dict[str, tuple[int, ...]]()
        hidden, inner = c["hidden_size"], c["intermediate_size"]
        query = c["num_attention_heads"] * self._head_size
        key = c["num_key_value_heads"] * self._head_size
        linears: dict[str, tuple[int, ...]] = {
            "attention.qkv": (query + 2 * key, hidden),
            "attention.dense": (hidden, query),
            "mlp.proj": (hidden, inner),
        }
        if self._phi3:
            # `MLP`: a matrix of twice the size for activations that gate, and no `gate`.
            double = 2 if c["hidden_act"] in {"swiglu", "gegelu"} else 1
            linears["mlp.fc"] = (double * inner, hidden)
        else:
            linears |= {"mlp.fc": (inner, hidden), "mlp.gate": (inner, hidden)}
        for layer in range(c["num_hidden_layers"]):
            prefix = f"transformer.layers.{layer}"
            for name in ("input_layernorm", "post_layernorm"):
                wanted[f"{prefix}.{name}.weight"] = (hidden,)
            for name in ("q_layernorm", "k_layernorm") if self._qk_norm else ():
                wanted[f"{prefix}.attention.{name}.weight"] = (self._head_size,)
            for name, shape in linears.items():
                wanted[f"{prefix}.{name}.weight"] = shape
                if self._is_fp8(f"{prefix}.{name}"):
                    wanted[f"{prefix}.{name}.weights_scaling_factor"] = (1,)
                    wanted[f"{prefix}.{name}.activation_scaling_factor"] = (1,)
            if not self._phi3 and c["attn_bias"]:
                wanted[f"{prefix}.attention.qkv.bias"] = (linears["attention.qkv"][0],)
            if c["quantization"].get("kv_cache_quant_algo") == "FP8":
                wanted[f"{prefix}.attention.kv_cache_scaling_factor"] = (1,)
        wanted["transformer.ln_f.weight"] = (hidden,)
        wanted["transformer.vocab_embedding.weight"] = (c["vocab_size"], hidden)
        for name, shape in wanted.items():
            if name not in self._weights:
                raise RuntimeError(f"Required but not provided tensors: {name}")
            if tuple(self._weights[name].shape) != shape:
                raise RuntimeError(f"{name} has another shape than the parameter, {shape}")

    def _is_fp8(self, linear: str) -> bool:
        return self._fp8 and linear not in self._excluded

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of every position; ids [S] -> [S, V]."""
        embedding = self._weights["transformer.vocab_embedding.weight"].float()
        x = embedding[ids]
        rotary = self._rotary(len(ids))
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"transformer.layers.{layer}"
            normed = self._norm(f"{prefix}.input_layernorm", x)
            x = x + self._attention(f"{prefix}.attention", normed, rotary)
            x = x + self._mlp(f"{prefix}.mlp", self._norm(f"{prefix}.post_layernorm", x))
        x = self._norm("transformer.ln_f", x)
        head = self._weights.get("lm_head.weight")
        logits: torch.Tensor = x @ (embedding if head is None else head.float()).T
        return logits

    def _norm(self, name: str, x: torch.Tensor, eps: float | None = None) -> torch.Tensor:
        import torch

        variance = x.pow(2).mean(-1, keepdim=True)
        normed = x * torch.rsqrt(variance + (eps or self.config["norm_epsilon"]))
        return self._weights[f"{name}.weight"].float() * normed

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self._weights[f"{name}.weight"].float()
        if self._is_fp8(name):
            weight = weight * self._weights[f"{name}.weights_scaling_factor"]
            if self._round_activations:
                x = _round(x, float(self._weights[f"{name}.activation_scaling_factor"]))
        elif self._weights[f"{name}.weight"].dtype.itemsize == 1:
            raise RuntimeError(f"{name} is FP8, the model was built without")
        y = x @ weight.T
        bias = self._weights.get(f"{name}.bias")
        has_bias = not self._phi3 and self.config["attn_bias"] and name.endswith(".qkv")
        return y if bias is None or not has_bias else y + bias.float()

    def _attention(
        self, name: str, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """Fused rows are q, k, v; grouped-query attention; causal, within the window."""
        import torch

        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size, length = self._head_size, len(x)
        q, k, v = (
            part.view(length, -1, size).transpose(0, 1)  # [H, S, D]
            for part in torch.split(
                self._linear(f"{name}.qkv", x), [heads * size, kv_heads * size, kv_heads * size], -1
            )
        )
        if self._qk_norm:  # `Attention` gets no eps, so it is the default of its own
            q, k = (self._norm(f"{name}.{n}_layernorm", x, 1e-5) for n, x in (("q", q), ("k", k)))
        q, k = _rotate(q, rotary), _rotate(k, rotary)
        k, v = (part.repeat_interleave(heads // kv_heads, dim=0) for part in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(size)
        behind = torch.arange(length)[:, None] - torch.arange(length)
        hidden = behind < 0
        if self._window is not None:
            hidden |= behind >= self._window
        attended = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        return self._linear(f"{name}.dense", attended.transpose(0, 1).reshape(length, -1))

    def _mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """`GatedMLP`: act(fc) * gate. `MLP` with swiglu: the second half gates the first."""
        import torch.nn.functional as nnf

        act = self.config["hidden_act"]
        if self._phi3:
            first, second = self._linear(f"{name}.fc", x).chunk(2, dim=-1)
            inner = first * nnf.silu(second)
        else:
            fc = self._linear(f"{name}.fc", x)
            inner = (nnf.silu(fc) if act == "silu" else nnf.gelu(fc)) * self._linear(
                f"{name}.gate", x
            )
        return self._linear(f"{name}.proj", inner)

    def _rotary(self, length: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosine and sine, each [S, R / 2], or None where nothing is rotated."""
        c = self.config
        has_long, is_long = (
            "longrope_scaling_short_factors" in c,
            c["position_embedding_type"] == "long_rope",
        )
        if self._phi3 and has_long != is_long:
            raise AssertionError("the layers and the tables disagree about LongRoPE")
        if c["position_embedding_type"] not in {"rope_gpt_neox", "long_rope"}:
            if c["architecture"].startswith("Qwen"):  # its layers do as the config says
                return None
            raise AssertionError("rotary_inv_freq and embed_positions must be provided")
        if c["architecture"].startswith("Qwen"):
            assert c["qwen_type"] in ("qwen2", "qwen3")
            assert c["seq_length"]
        share = c["rotary_pct"] if self._phi3 else 1.0
        table = int(self.config["head_size"] * c.get("rotary_pct", 1.0))
        assert table == int(self._head_size * share), "the layers and the tables disagree in size"
        return self._table(table, length)

    def _table(self, size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        c, gain = self.config, 1.0
        frequencies = 1.0 / (c["rotary_base"] ** (np.arange(0, size, 2) / size)).astype(np.float32)
        scaling = None if self._phi3 else c["rotary_scaling"]
        if c["position_embedding_type"] == "long_rope":
            original = c["original_max_position_embeddings"]
            kind = "long" if length > original else "short"
            frequencies /= np.asarray(c[f"longrope_scaling_{kind}_factors"], np.float32)
            ratio = c["max_position_embeddings"] / original
            gain = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        elif scaling is not None:
            kind = scaling.get("type", scaling.get("rope_type"))
            if kind != "llama3":
                raise ValueError(f"Unsupported rotary scaling type: {kind}")
            frequencies = _llama3(frequencies, scaling)
        angles = np.outer(np.arange(length, dtype=np.float32), frequencies)
        return torch.from_numpy(np.cos(angles) * gain), torch.from_numpy(np.sin(angles) * gain)


def _llama3(frequencies: np.ndarray[Any, Any], scaling: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Long waves are slowed, short ones kept, the rest is blended."""
    factor = scaling.get("factor", 8.0)
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    turns = scaling.get("original_max_position_embeddings", 8192) * frequencies / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    blended: np.ndarray[Any, Any] = share * frequencies + (1 - share) * frequencies / factor
    return blended.astype(np.float32)


def _rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """The leading elements of each head, first half paired with second half; x [H, S, D]."""
    import torch

    if rotary is None:
        return x
    cos, sin = rotary
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _round(x: torch.Tensor, scale: float) -> torch.Tensor:
    """To E4M3 and back."""
    import torch

    return (x / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).to(x.dtype) * scale


PROMPT_LENGTHS = (5, 17, 80)
"""The last is beyond the windows and the original contexts of the tiny models (24 and 64)."""


LOGIT_BOUND = 1e-4
"""Largest difference of a logit without rounding of activations. Logits have a deviation of 1.2 to
1.3; both sides compute in float32 but in another order, and differ by 1.6e-5 at most (measured
2026-11-25)."""


ROUNDED_BOUND = 0.06
"""Root mean square of the difference over the logits' deviation, activations rounded. Equal to the
bit for short prompts; for long ones a last bit flips an E4M3 code here and there, and 0.035 comes
of it. An activation scale that is 10 % off gives 0.095 or more (measured 2026-11-25)."""


def prompts() -> list[torch.Tensor]:
    """Token ids, the same each time."""
    import torch

    return [
        torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(length))
        for length in PROMPT_LENGTHS
    ]


@cache
def transformers_logits(unified: Path, *, round_activations: bool) -> Logits:
    """Logits [S, V] of ids [S] by the Transformers model with the checkpoint's weights.

    Loaded once for each folder: many cases damage a copy of one conversion.
    """
    from pipeline.quant.simulate import load_simulation

    model = load_simulation(unified)
    if not round_activations:
        for module in model.modules():
            module._forward_pre_hooks.clear()  # the rounding that the simulation put there

    def logits(ids: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.no_grad():
            found: torch.Tensor = model(ids[None], use_cache=False).logits[0]
        return found

    return logits


def largest_difference(one: Logits, other: Logits) -> float:
    """Over all prompts and positions."""
    return max(float((one(ids) - other(ids)).abs().max()) for ids in prompts())


def relative_difference(one: Logits, other: Logits) -> float:
    """Root mean square of the difference over the deviation, of the worst prompt."""
    return max(
        float((one(ids) - (wanted := other(ids))).pow(2).mean().sqrt() / wanted.std())
        for ids in prompts()
    )
