"""bfloat16: what lm_head, embeddings, norms and the linears that a recipe keeps are stored as."""

from __future__ import annotations

from pipeline.quant.spec import QuantSpec

SPEC = QuantSpec(
    name="bf16",
    title="16-bit",
    weight_dtype="bfloat16",
    quant_algo=None,
    operands="fp16",
    native_sm=80,
    dequantize=lambda weights, _scale: weights.float(),
)
