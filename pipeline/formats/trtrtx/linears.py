"""Linears of the decoder graph: FP8 or 16-bit, with or without a bias, stored fused or not.

Phi-3 stores q/k/v and gate/up as one tensor each. The graph has a MatMul per part all the same, on
the part's rows of the stored tensor, which share its scale. TensorRT-RTX 1.7.1 fuses separate
MatMuls into one GEMM that carries their names; one MatMul whose output is split it may take apart
instead and forget the name (so with Phi-3's three equal parts; both measured 2026-11-25), and what
has no name proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.formats.trtrtx.graph_writer import GraphWriter
from pipeline.model.spec import Layer, ModelSpec, layer_name


@dataclass(frozen=True)
class MatMul:
    """One linear of one layer.

    Attributes:
        module: Hugging Face name of the module that stores its weight.
        name: Name of the node: the module's, and the role where the module holds several linears.
        rows: First row of the stored weight and the one after the last; None for all.
    """

    module: str
    name: str
    rows: tuple[int, int] | None


def matmuls(layer: Layer, number: int) -> dict[str, MatMul]:
    """The linears of a layer by their role."""
    made = {}
    for linear in layer.linears:
        module = f"{layer_name(number)}.{linear.module}"
        if linear.rows == layer.modules[linear.module][0]:
            made[linear.role] = MatMul(module, module, None)
        else:
            rows = (linear.first_row, linear.first_row + linear.rows)
            made[linear.role] = MatMul(module, f"{module}.{linear.role}", rows)
    return made


def node_names(spec: ModelSpec, modules: Iterable[str]) -> tuple[str, ...]:
    """Names of the MatMuls that compute these modules; the names that a compiled plan shows."""
    names: dict[str, list[str]] = {}
    for number, layer in enumerate(spec.layers):
        for matmul in matmuls(layer, number).values():
            names.setdefault(matmul.module, []).append(matmul.name)
    return tuple(name for module in modules for name in names[module])


def write_linears(w: GraphWriter, linears: Sequence[MatMul], x: str) -> list[str]:
    """Linears that read the same input: quantized once when they share one input scale.

    Args:
        w: Gets the nodes.
        linears: Those whose module has a `.bias` in the checkpoint add it.
        x: Their input, [.., in].

    Returns:
        Their outputs, [.., out] each.
    """
    quantized: dict[float, str] = {}
    outputs = []
    for linear in linears:
        if w.checkpoint.is_quantized(linear.module):
            scale = float(w.checkpoint.scalar(f"{linear.module}.input_scale"))
            if scale not in quantized:
                quantized[scale] = _quantize(w, linear.module, x, scale)
            product = _matmul(w, linear, quantized[scale], _fp8_weight(w, linear))
        else:
            weight = w.weight_as_activation(f"{linear.name}.weight", *_stored(linear))
            product = _matmul(w, linear, x, weight)
        if f"{linear.module}.bias" in w.checkpoint.tensors:
            bias = w.weight_as_activation(f"{linear.name}.bias", f"{linear.module}.bias")
            product = w.op("Add", [product, bias], f"{linear.name}.biased")
        outputs.append(product)
    return outputs


def _stored(linear: MatMul) -> tuple[str, tuple[int, int] | None]:
    """Tensor and rows that hold the weight."""
    return f"{linear.module}.weight", linear.rows


def _matmul(w: GraphWriter, linear: MatMul, x: str, weight: str) -> str:
    """Multiply x [.., in] with weight [out, in] transposed; the node has the linear's name."""
    transposed = w.op("Transpose", [weight], f"{linear.name}.weight.t", perm=[1, 0])
    return w.op("MatMul", [x, transposed], linear.name)


def _quantize(w: GraphWriter, module: str, x: str, scale: float) -> str:
    """Round activations to E4M3 with the calibrated scale: the Q/DQ pair that FP8 GEMMs need.

    The scale stays float32: in float16 a scale below 6e-5 would be subnormal.
    """
    import ml_dtypes
    import numpy as np

    scale_name = w.constant(f"{module}.input_scale", np.array(scale, np.float32))
    zero = w.constant("fp8_zero", np.zeros((), ml_dtypes.float8_e4m3fn))
    codes = w.op("QuantizeLinear", [x, scale_name, zero], f"{module}.input.q")
    return w.op(
        "DequantizeLinear",
        [codes, scale_name, zero],
        f"{module}.input.dq",
        output_dtype=w.dtype,
    )


def _fp8_weight(w: GraphWriter, linear: MatMul) -> str:
    """The checkpoint's E4M3 codes, dequantized in the graph."""
    import numpy as np

    scale = f"{linear.module}.weight_scale"
    scale = w.constant(scale, np.array(w.checkpoint.scalar(scale), np.float32))
    codes = w.weight(f"{linear.name}.weight", *_stored(linear))
    return w.op(
        "DequantizeLinear", [codes, scale], f"{linear.name}.weight.dq", output_dtype=w.dtype
    )
