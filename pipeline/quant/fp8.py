"""FP8: E4M3 weights and static E4M3 activations, one scale for each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.quant.modelopt import ModelOptQuantizer, with_cache_scales
from pipeline.quant.spec import FP8_E4M3_MAX, OnnxPattern, OnnxWriter, QuantSpec

if TYPE_CHECKING:
    import numpy as np
    import torch


def round_to_e4m3(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Round to E4M3 and back: divide, saturate at 448, round to nearest even, multiply.

    Division, not multiplication with the reciprocal: that is what QuantizeLinear does, and a
    last-bit difference flips codes.
    """
    import torch

    codes = (x / scale).clamp(-FP8_E4M3_MAX, FP8_E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.to(x.dtype) * scale


def modelopt_config(kept: Sequence[str], _group: int | None) -> dict[str, Any]:
    """ModelOpt's FP8 config with KV-cache scales, less the kept linears."""
    import modelopt.torch.quantization as mtq

    names = [f"{name}.{kind}_quantizer" for name in sorted(kept) for kind in ("weight", "input")]
    return with_cache_scales(mtq.FP8_DEFAULT_CFG, disabled=names)


def _input_nodes(w: OnnxWriter, module: str, x: str, scale: np.float32) -> str:
    """Round activations to E4M3 with the calibrated scale: the Q/DQ pair that FP8 GEMMs need.

    The scale stays float32: in float16 a scale below 6e-5 would be subnormal.
    """
    import ml_dtypes
    import numpy as np

    scale_name = w.constant(f"{module}.input_scale", np.array(scale, np.float32))
    scale_zero = [scale_name, w.constant("fp8_zero", np.zeros((), ml_dtypes.float8_e4m3fn))]
    codes = w.op("QuantizeLinear", [x, *scale_zero], f"{module}.input.q")
    name = f"{module}.input.dq"
    return w.op("DequantizeLinear", [codes, *scale_zero], name, output_dtype=w.dtype)


def _weight_nodes(w: OnnxWriter, codes: str, scale: str, _group: int) -> str:
    """The checkpoint's E4M3 codes, dequantized in the graph."""
    return w.op("DequantizeLinear", [codes, scale], f"{codes}.dq", output_dtype=w.dtype)


SPEC = QuantSpec(
    name="fp8",
    title="FP8",
    weight_dtype="float8_e4m3fn",
    scales=("weight_scale", "input_scale"),
    code_max=FP8_E4M3_MAX,
    relative_step=2.0**-4,  # half a unit in the last place of three mantissa bits
    absolute_step=2.0**-10,  # half of the smallest subnormal, 2^-9 (OCP, table 1)
    # Below 2^-10 / 448 of the largest a weight rounds to zero: of normally distributed ones 9 in a
    # million, of SmolLM2's linears 12 in a million at most (2026-11-30). More says that a few
    # values set the scale.
    max_lost_share=0.1,
    quant_algo="FP8",
    operands="fp8",
    native_sm=89,
    dequantize=lambda codes, scale: codes.float() * scale,
    round_input=round_to_e4m3,
    modelopt_config=modelopt_config,
    onnx=OnnxPattern(weight=_weight_nodes, input=_input_nodes, operands="fp8_e4m3"),
)


class Fp8Quantizer(ModelOptQuantizer):
    """Per-tensor FP8 with static activation scales."""

    precision = SPEC.name


KIND = Fp8Quantizer
