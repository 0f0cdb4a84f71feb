"""Writes an ONNX graph node by node; weights stay in one external file shared by several graphs.

A fused linear (Phi-3's q/k/v and gate/up) is a MatMul per part all the same, on the part's rows,
which share its scale. TensorRT-RTX 1.7.1 fuses separate MatMuls into one GEMM that carries their
names; one MatMul whose output is split it may take apart and forget the name (so with Phi-3's three
equal parts; both measured 2026-11-25), and what has no name proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import CorruptError
from pipeline.model.spec import Layer, ModelSpec, layer_name
from pipeline.quant.unified import UnifiedCheckpoint

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

WEIGHTS_FILE = "weights.bin"
_ALIGNMENT_BYTES = 4096
"""Lets a loader memory-map each tensor (ONNX's external-data guidance: page size)."""

Rows = tuple[int, int] | None
"""First row of a stored weight and the one after the last; None for all."""


@dataclass(frozen=True)
class WeightSlot:
    """Byte range of one tensor in the external file, its type (NumPy's or ml_dtypes') and shape."""

    offset: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]


def write_weights(checkpoint: UnifiedCheckpoint, path: Path) -> dict[str, WeightSlot]:
    """Copy every tensor of the model into one file with aligned offsets, and scales of groups.

    Raises:
        CorruptError: A tensor is missing, left over or malformed.
    """
    checkpoint.check_tensors()
    wanted, parameters = checkpoint.spec.tensors(), checkpoint.parameters
    stored = {parameters[name]: name for name in wanted if name in parameters}
    if checkpoint.precision.group_sizes:
        scales = [f"{module}.weight_scale" for module in checkpoint.quantized_linears]
        stored |= {name: name for name in scales}
    pattern = checkpoint.precision.onnx
    slots: dict[str, WeightSlot] = {}
    with path.open("wb") as stream:
        for entry in checkpoint.tensors.values():
            if entry.name not in stored:
                continue
            stream.write(b"\0" * (-stream.tell() % _ALIGNMENT_BYTES))
            values, name, start = checkpoint.read(entry.name), stored[entry.name], stream.tell()
            kind, shape = entry.dtype, entry.shape
            if name != entry.name and pattern is not None and pattern.codes is not None:
                values, kind, shape = pattern.codes(values), pattern.operands, wanted[name]
            slots[name] = WeightSlot(start, entry.size_bytes, kind, shape)
            values.tofile(stream)
    return slots


@dataclass
class GraphWriter:
    """Collects nodes and initializers; every method returns the name of the value that it made.

    `slots` are of `write_weights`, `dtype` is the ONNX element type of activations.
    """

    checkpoint: UnifiedCheckpoint
    slots: dict[str, WeightSlot]
    dtype: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    _dtypes: dict[str, int] = field(default_factory=dict)

    def op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """A node with one output, named like it."""
        import onnx

        self.nodes.append(onnx.helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, values: NDArray[Any]) -> str:
        import onnx

        if name not in self._dtypes:
            self._add(onnx.numpy_helper.from_array(values, name))
        return name

    def integers(self, name: str, values: int | Sequence[int]) -> str:
        import numpy as np

        return self.constant(name, np.array(values, np.int64))

    def _add(self, tensor: onnx.TensorProto) -> None:
        self._dtypes[tensor.name] = tensor.data_type
        self.initializers.append(tensor)

    def weight(self, name: str, stored: str | None = None, rows: Rows = None) -> str:
        """A tensor of the checkpoint, `stored` where it has another name, or some of its rows."""
        import ml_dtypes  # noqa: F401  registers bfloat16 and float8 with NumPy
        import numpy as np
        import onnx

        if name in self._dtypes:
            return name
        slot = self.slots[stored or name]
        first, end = rows or (0, slot.shape[0])
        if not 0 <= first < end <= slot.shape[0]:
            raise CorruptError(
                f"{self.checkpoint.dir}: tensor {stored or name} has the shape {slot.shape}; "
                f"config.json says that rows {first} to {end - 1} are {name}; make it again"
            )
        row_bytes = slot.size_bytes // slot.shape[0]
        tensor = onnx.TensorProto(
            name=name,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(slot.dtype)),
            dims=(end - first, *slot.shape[1:]),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", WEIGHTS_FILE),
            ("offset", str(slot.offset + first * row_bytes)),
            ("length", str((end - first) * row_bytes)),
        ):
            tensor.external_data.add(key=key, value=value)
        self._add(tensor)
        return name

    def weight_as_activation(self, name: str, stored: str | None = None, rows: Rows = None) -> str:
        """A weight cast to the activations' dtype; no cast where it has that dtype already."""
        source = self.weight(name, stored, rows)
        if self._dtypes[name] == self.dtype:
            return source
        cast = f"{name}.cast"
        if cast not in self._dtypes:
            self._dtypes[cast] = self.dtype
            self.op("Cast", [source], cast, to=self.dtype)
        return cast


@dataclass(frozen=True)
class MatMul:
    """One linear of one layer: `rows` of the weight of a Hugging Face module.

    `name` is the node's: the module's, and the role where the module holds several linears.
    """

    module: str
    name: str
    rows: Rows


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
    """Linears of one input [.., in], quantized once where they share its scale: [.., out] each."""
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
            scales, group = f"{stored}_scale", 0
            if scales in w.slots:
                group = w.slots[stored].shape[1] // w.slots[scales].shape[1]
                scales = w.weight_as_activation(f"{linear.name}.weight_scale", scales, linear.rows)
            else:
                w.constant(scales, np.array(w.checkpoint.scalar(scales), np.float32))
            codes = w.weight(f"{linear.name}.weight", stored, linear.rows)
            weight = pattern.weight(w, codes, scales, group)
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
