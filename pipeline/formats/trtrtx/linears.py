"""Linears of the decoder graph: quantized or 16-bit, with or without a bias, stored fused or not.

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
    import numpy as np

    pattern = w.checkpoint.precision.onnx
    rounded: dict[float, str] = {}
    outputs = []
    for linear in linears:
        stored = f"{linear.module}.weight"
        read = x
        if pattern is not None and w.checkpoint.is_quantized(linear.module):
            if pattern.input is not None:
                scale = w.checkpoint.scalar(f"{linear.module}.input_scale")
                if float(scale) not in rounded:
                    rounded[float(scale)] = pattern.input(w, linear.module, x, scale)
                read = rounded[float(scale)]
            scale_name = f"{stored}_scale"
            w.constant(scale_name, np.array(w.checkpoint.scalar(scale_name), np.float32))
            codes = w.weight(f"{linear.name}.weight", stored, linear.rows)
            weight = pattern.weight(w, codes, scale_name)
        else:
            weight = w.weight_as_activation(f"{linear.name}.weight", stored, linear.rows)
        transposed = w.op("Transpose", [weight], f"{linear.name}.weight.t", perm=[1, 0])
        product = w.op("MatMul", [read, transposed], linear.name)
        if f"{linear.module}.bias" in w.checkpoint.tensors:
            stored = f"{linear.module}.bias"
            bias = w.weight_as_activation(f"{linear.name}.bias", stored, linear.rows)
            product = w.op("Add", [product, bias], f"{linear.name}.biased")
        outputs.append(product)
    return outputs
