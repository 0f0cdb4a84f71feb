"""What a TensorRT-LLM 1.2 checkpoint holds: the keys of its `config.json`, and its tensors.

TensorRT-LLM gives most keys a default and says nothing when one is missing, so a checkpoint without
`rotary_base` builds and runs, with the wrong rotary embedding. Hence every key whose default could
be wrong for some model is written, also where the default happens to be right.

`_linears` says which linear is made of which. Phi-3's halves of `mlp.fc` are swapped, up before
gate, since the activation `swiglu` lets the second half of its input gate the first. Nothing is
read but headers and scales. TensorRT-LLM has one matrix for q, k and v, so they share a scale by
layout; and `trtllm-build` fuses gate and up (`use_fused_mlp`, on by default),
rounding to the larger scale where theirs differ. The converter does that itself, for both, and says
what it cost: what was checked is what runs. Our own checkpoints share scales already: exact bytes.

`trtllm-build` casts both scales of an FP8 linear to the 16-bit dtype (with `gemm_plugin` fp8, that
of the activations only). The checkpoint keeps float32; ours are bfloat16 values anyway.

Sources, all of NVIDIA/TensorRT-LLM. Where the public index of file versions tells no commit, its
index number is given: `models/modeling_utils.py` (b35ac1b6: keys, names, `fuse_gate_mlp`,
`share_embedding`), `models/llama/config.py` (89fd9b74) and `model.py` (#663997685),
`models/qwen/config.py` (373970a8), `model.py` (#984454274; Qwen3's norms: #54584513530, a copy
with more in it) and `convert.py` (#1134239761: their names), `models/phi3/config.py` (1e6a4f97),
`model.py` (c4dc529f) and `convert.py` (89fd9b74: halves), `models/model_weights_loader.py`
(#503652548: which Hugging Face tensor is which), `layers/attention.py` (#1178835378),
`quantization/layers.py` (#790827869: FP8 linears), `quantization/quantize.py` (#235018984),
`mapping.py` (b35ac1b6, which is 1.2.0rc2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline.core.errors import CorruptError, Fault, RecipeError
from pipeline.model.spec import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    Layer,
    Linear,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelSpec,
    YarnScaling,
    layer_name,
    longrope_gain,
    not_built,
)
from pipeline.quant.unified import UnifiedCheckpoint

Dtype = Literal["bfloat16", "float16"]
"""Type of activations and of every tensor that is not FP8."""


_QWEN_SEQ_LENGTH = 8192
"""`seq_length` scales attention only where `use_logn_attn` is on; the layer reads it regardless.
The value is the one that TensorRT-LLM's own conversion falls back to (`models/qwen/config.py`)."""


def trtllm_config(
    spec: ModelSpec, *, dtype: Dtype, kv_fp8: bool, exclude: Sequence[str]
) -> dict[str, Any]:
    """Everything that TensorRT-LLM needs to know about the model, beside its weights.

    `exclude` names the linears that are not FP8 in TensorRT-LLM's words, lm_head among them; with
    `kv_fp8` the weights must hold scales of the cache.

    Raises:
        RecipeError: TensorRT-LLM's class for this architecture would silently ignore something
            that this model needs.
    """
    layer = buildable_layer(spec)
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
        "qk_layernorm": attention.qk_norm,  # the Qwen layers go by `qwen_type`
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


def buildable_layer(spec: ModelSpec) -> Layer:
    """The layer that all layers are like; a RecipeError as in `trtllm_config`."""
    if spec.architecture not in _FAMILIES:
        message = f"is {spec.architecture}; the converter for TensorRT-LLM has "
        raise RecipeError([not_built("architectures", message + ", ".join(_FAMILIES))])
    layer = spec.uniform_layer()
    if faults := list(_faults(spec, layer)):
        raise RecipeError(faults)
    return layer


def _rope(spec: ModelSpec) -> dict[str, Any]:
    """Rotary settings; `rotary_scaling` is null for the plain embedding, as no type is `default`.

    `type` and `rope_type` are both written, since older readers know one of them only. LongRoPE's
    own keys change the layers, `position_embedding_type` the tables: both are needed.
    """
    attention = spec.layers[0].attention
    rope, head_dim = attention.rope, attention.head_dim
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
_QWEN2 = {
    "attn_bias": True,
    "mlp_bias": False,
    "qwen_type": "qwen2",
    "seq_length": _QWEN_SEQ_LENGTH,
    "use_logn_attn": False,
}


_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,  # built by the Llama class
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": {**_QWEN2, "attn_bias": False, "qwen_type": "qwen3"},
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
    attention, rope, scaling = layer.attention, layer.attention.rope, layer.attention.rope.scaling
    head_dim, longest = attention.head_dim, spec.max_position_embeddings
    if isinstance(scaling, LinearScaling | YarnScaling):
        kind = type(scaling).__name__.removesuffix("Scaling").lower()
        yield not_built("rope_type", f"is {kind}, which is not written for TensorRT-LLM")
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


QK_NORM_EPS = 1e-5
"""What the Qwen layer's norms of q and k add to the mean square: it passes no `eps` to `Attention`,
whose default this is; the other norms add the model's `norm_epsilon` (pull request 5650)."""


FP8 = "float8_e4m3fn"
"""NumPy (ml_dtypes) name of E4M3."""


KV_SCALE_FLOOR = 1.0
"""Smallest scale of an FP8 KV cache that is written.

With FP8 weights and an FP8 cache `trtllm-build` selects FP8 context attention, which rounds query,
key and value with this one scale: the first product is multiplied with its square (C++ sources of
the 1.2 line, index numbers 190937516, 2653699903 and 634291217). The query was not calibrated, so a
scale below 1 could clip it. ModelOpt's own TensorRT-LLM exporter has the same floor
(`get_kv_cache_scaling_factor`, 0.47.0). E4M3 keeps its precision down to 2^-6, so a scale that is
larger than need be costs little."""


_FLOAT16_SCALES = (2.0**-14, 65504.0)
"""Smallest and largest normal float16 (IEEE 754): `trtllm-build` casts the scales of FP8 linears to
the 16-bit dtype, where one outside loses precision, becomes 0 or infinite."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some rows of one source tensor (None: all); codes move from `old_scale` to `new_scale`."""

    tensor: str
    rows: tuple[int, int] | None = None
    old_scale: float = 1.0
    new_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """One tensor of the file, by TensorRT-LLM's name: pieces on top of each other, or one number.

    Pieces of another float type are cast to `dtype`, NumPy's (or ml_dtypes') name; a number is a
    float32 scale of shape (1,).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    value: float | None = None


def plan_tensors(checkpoint: UnifiedCheckpoint, *, dtype: Dtype, kv_fp8: bool) -> TensorPlan:
    """Map every tensor of a unified checkpoint of any exporter, per-tensor static FP8.

    Raises:
        CorruptError: A tensor is missing, has another shape than `config.json` implies, is not
            known, or holds a scale that is no positive number.
        RecipeError: The checkpoint is whole but cannot be expressed: no FP8 in it, half of a fused
            group FP8, another kind of quantization, no KV scales although they were asked for.
    """
    if checkpoint.precision.quant_algo != "FP8":
        raise _unfit(
            str(checkpoint.dir),
            f"holds {checkpoint.precision.title} linears and no FP8 linear; quantize the model to "
            "FP8 first (enginesmith build, or ModelOpt's "
            "export_hf_checkpoint)",
        )
    checkpoint.check_tensors()
    plan, spec = TensorPlan(checkpoint, dtype), checkpoint.spec
    plan.add_plain("transformer.vocab_embedding", EMBEDDING)
    for number, layer in enumerate(spec.layers):
        source, target = layer_name(number), f"transformer.layers.{number}"
        plan.add_plain(f"{target}.input_layernorm", f"{source}.input_layernorm")
        for name, parts in _linears(layer).items():
            plan.add_linear(f"{target}.{name}", source, layer, parts)
        for part in "qk" if layer.attention.qk_norm else "":
            norm = f"{source}.self_attn.{part}_norm"
            plan.add_plain(f"{target}.attention.{part}_layernorm", norm)
        if kv_fp8:
            plan.add_kv_scale(number)
        plan.add_plain(f"{target}.post_layernorm", f"{source}.post_attention_layernorm")
    plan.add_plain("transformer.ln_f", FINAL_NORM)
    # TensorRT-LLM accepts a file without lm_head and then uses the embedding, also for a model that
    # is not tied: wrong, and no message. The builder finds equal tables and keeps one.
    plan.add_plain(LM_HEAD, EMBEDDING if spec.tied else LM_HEAD)
    return plan


def _linears(layer: Layer) -> dict[str, tuple[Linear, ...]]:
    """TensorRT-LLM's linears and what they are made of, top to bottom."""
    gate, up = layer.linear("gate"), layer.linear("up")
    return {
        "attention.qkv": layer.group("qkv"),
        "attention.dense": (layer.linear("o"),),
        "mlp.fc": (up, gate) if layer.fused_mlp else (gate,),
        **({} if layer.fused_mlp else {"mlp.gate": (up,)}),
        "mlp.proj": (layer.linear("down"),),
    }


@dataclass
class TensorPlan:
    """The whole file; every method raises what `plan_tensors` raises.

    Attributes:
        dtype: Type of what is not FP8.
        tensors: In file order.
        fp8: TensorRT-LLM's names of the FP8 linears.
        excluded: Those of the 16-bit ones, lm_head first: `exclude_modules`.
        merged_inputs: Linears whose parts had different activation scales; the largest is used.
    """

    checkpoint: UnifiedCheckpoint
    dtype: Dtype
    tensors: list[PlannedTensor] = field(default_factory=list)
    fp8: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=lambda: [LM_HEAD])
    merged_inputs: list[str] = field(default_factory=list)

    def add_plain(self, target: str, source: str) -> None:
        """One 16-bit weight."""
        piece = Piece(tensor=f"{source}.weight")
        shape = self.checkpoint.entry(piece.tensor).shape
        self._add(f"{target}.weight", self.dtype, shape, [piece])

    def add_linear(self, target: str, source: str, layer: Layer, parts: Sequence[Linear]) -> None:
        """Weight, scales and bias of a linear, made of `parts` of a layer, top to bottom."""
        group = layer.group(parts[0].fused) if parts[0].fused else parts
        sharing = tuple(dict.fromkeys(f"{source}.{part.module}" for part in group))
        kept = [name for name in sharing if not self.checkpoint.is_quantized(name)]
        if kept and len(kept) < len(sharing):
            raise _unfit(
                target,
                f"mixes precisions: {', '.join(kept)} is not FP8, but is fused with what is; "
                "keep all of a group in 16 bits or none (quantizer.keep_16bit)",
            )
        rows = [
            (f"{source}.{part.module}", (part.first_row, part.first_row + part.rows))
            for part in parts
        ]
        shape = (sum(part.rows for part in parts), parts[0].columns)
        if kept:
            self.excluded.append(target)
            pieces = [Piece(tensor=f"{name}.weight", rows=some) for name, some in rows]
            self._add(f"{target}.weight", self.dtype, shape, pieces)
        else:
            self._add_fp8(target, sharing, shape, rows)
        if parts[0].bias:
            pieces = [Piece(tensor=f"{name}.bias", rows=some) for name, some in rows]
            self._add(f"{target}.bias", self.dtype, shape[:1], pieces)

    def _add_fp8(
        self,
        target: str,
        sharing: Sequence[str],
        shape: tuple[int, ...],
        rows: Sequence[tuple[str, tuple[int, int]]],
    ) -> None:
        """The matrix with the largest scales of those that share."""
        scales = {name: self._scale(f"{name}.weight_scale") for name in sharing}
        inputs = {self._scale(f"{name}.input_scale") for name in sharing}
        shared = max(scales.values())
        pieces = [
            Piece(tensor=f"{name}.weight", rows=some, old_scale=scales[name], new_scale=shared)
            for name, some in rows
        ]
        self.fp8.append(target)
        self._add(f"{target}.weight", FP8, shape, pieces)
        if len(inputs) > 1:
            self.merged_inputs.append(target)
        for kind, value in (("weights", shared), ("activation", max(inputs))):
            name = f"{target}.{kind}_scaling_factor"
            least, most = _FLOAT16_SCALES
            if self.dtype == "float16" and not least <= value <= most:
                raise _unfit(name, f"is {value:g}, beyond the range of float16; use bfloat16")
            self._add_number(name, value)

    def _scale(self, name: str) -> float:
        entry = self.checkpoint.tensors.get(name)
        if entry is None:
            kind = name.rpartition(".")[2]
            if any(other.endswith(f".{kind}") for other in self.checkpoint.tensors):
                raise self._corrupt(f"{name} is missing; static per-tensor FP8 needs it")
            raise _unfit(kind, "is in no linear; only FP8 with static scales is converted")
        if math.prod(entry.shape) != 1:
            raise _unfit(name, f"has shape {entry.shape}; only one scale for a tensor is converted")
        value = float(self.checkpoint.scalar(name))
        if not 0 < value < math.inf:
            raise self._corrupt(f"{name} is {value}, no positive number")
        return value

    def add_kv_scale(self, layer: int) -> None:
        """One scale for keys and values: the larger one, and no less than `KV_SCALE_FLOOR`.

        TensorRT-LLM's loader takes the maximum as well. The separate `k_cache_scaling_factor` and
        `v_cache_scaling_factor` would override ours, so they are not written.
        """
        attention = f"{layer_name(layer)}.self_attn"
        pairs = (
            ("k_proj.k_scale", "v_proj.v_scale"),
            ("k_scale", "v_scale"),
        )  # latter: Qwen, packed
        named = ([f"{attention}.{end}" for end in ends] for ends in pairs)
        names = next((both for both in named if any(map(self.checkpoint.tensors.get, both))), None)
        if names is None:
            raise _unfit(
                attention,
                "has no k_scale and v_scale for an FP8 KV cache; use kv_cache_dtype=bfloat16 or "
                "calibrate the cache (ModelOpt's FP8_KV_CFG)",
            )
        value = max(KV_SCALE_FLOOR, *(self._scale(name) for name in names))
        self._add_number(f"transformer.layers.{layer}.attention.kv_cache_scaling_factor", value)

    def _add(self, name: str, dtype: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> None:
        tensor = PlannedTensor(name=name, dtype=dtype, shape=shape, pieces=tuple(pieces))
        self.tensors.append(tensor)

    def _add_number(self, name: str, value: float) -> None:
        self.tensors.append(PlannedTensor(name=name, dtype="float32", shape=(1,), value=value))

    def _corrupt(self, fault: str) -> CorruptError:
        return CorruptError(
            f"{self.checkpoint.dir} cannot be converted: {fault}; make the checkpoint again"
        )


def _unfit(path: str, message: str) -> RecipeError:
    return RecipeError([Fault(path, message)])
