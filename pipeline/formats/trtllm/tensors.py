"""Plans `rank0.safetensors`: which source goes where, and with which scale.

| TensorRT-LLM | Llama, Mistral, Qwen2 | Phi-3 |
| --- | --- | --- |
| `attention.qkv` | q_proj, k_proj, v_proj on top of each other | qkv_proj, as it is |
| `attention.dense` | o_proj | o_proj |
| `mlp.fc` | gate_proj | gate_up_proj, halves swapped: up, then gate |
| `mlp.gate` | up_proj | |
| `mlp.proj` | down_proj | down_proj |

The halves are swapped since the activation `swiglu` lets the second half of its input gate the
first. Nothing is read but headers and scales. TensorRT-LLM has one matrix for q, k and v, so they
share a scale by layout; and `trtllm-build` fuses gate and up (`use_fused_mlp`, on by default),
rounding to the larger scale where theirs differ. The converter does that itself, for both, so that
what was checked is what runs, and says what it cost. Our own checkpoints share scales already:
exact bytes.

`trtllm-build` casts both scales of an FP8 linear to the 16-bit dtype (with `gemm_plugin` fp8, that
of the activations only). The checkpoint keeps float32; ours are bfloat16 values anyway.

Sources in NVIDIA/TensorRT-LLM (see config.py on the numbers): `models/modeling_utils.py`
(b35ac1b6: names, `fuse_gate_mlp`, `share_embedding`), `models/model_weights_loader.py`
(#503652548: which Hugging Face tensor is which), `models/phi3/convert.py` (89fd9b74: halves),
`quantization/layers.py` (#790827869: FP8 linears), `quantization/quantize.py` (#235018984).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.core.errors import CorruptError, Fault, RecipeError
from pipeline.formats.trtllm.config import Dtype
from pipeline.model.spec import EMBEDDING, FINAL_NORM, LM_HEAD, Layer, Linear, layer_name
from pipeline.quant.unified import UnifiedCheckpoint

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
            "holds no FP8 linear; quantize the model first (enginesmith build, or ModelOpt's "
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
        name = f"{source}.weight"
        shape = self.checkpoint.entry(name).shape
        self._add(f"{target}.weight", self.dtype, shape, [Piece(tensor=name)])

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
        """One positive number."""
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
        names = [f"{attention}.{part}_proj.{part}_scale" for part in ("k", "v")]
        if not any(name in self.checkpoint.tensors for name in names):
            raise _unfit(
                attention,
                "has no k_scale and v_scale for an FP8 KV cache; use kv_cache_dtype=bfloat16 or "
                "calibrate the cache (ModelOpt's FP8_KV_CFG)",
            )
        value = max(KV_SCALE_FLOOR, *(self._scale(name) for name in names))
        self._add_number(f"transformer.layers.{layer}.attention.kv_cache_scaling_factor", value)

    def _add(self, name: str, dtype: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> None:
        self.tensors.append(
            PlannedTensor(name=name, dtype=dtype, shape=shape, pieces=tuple(pieces))
        )

    def _add_number(self, name: str, value: float) -> None:
        self.tensors.append(PlannedTensor(name=name, dtype="float32", shape=(1,), value=value))

    def _corrupt(self, fault: str) -> CorruptError:
        return CorruptError(
            f"{self.checkpoint.dir} cannot be converted: {fault}; make the checkpoint again"
        )


def _unfit(path: str, message: str) -> RecipeError:
    return RecipeError([Fault(path, message)])
