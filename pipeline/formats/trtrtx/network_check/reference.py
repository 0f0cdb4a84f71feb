"""The float32 twin of the graph on ONNX Runtime, with what its quantizers see made visible."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.formats.trtrtx.network_check.interface import ANY, Signature
from pipeline.formats.trtrtx.network_check.rules import Array

if TYPE_CHECKING:
    import onnx


class ReferenceModel:
    """An ONNX file, opened without its external data.

    Attributes:
        quantized: Names of the tensors that QuantizeLinear nodes read.
        dequantized: Names of the tensors that come out of their DequantizeLinear nodes.
    """

    def __init__(self, path: Path) -> None:
        import onnx

        self._dir = path.parent
        self._model: onnx.ModelProto = onnx.load(path, load_external_data=False)
        self._initializers = {tensor.name: tensor for tensor in self._model.graph.initializer}
        nodes = self._model.graph.node
        codes = {node.output[0] for node in nodes if node.op_type == "QuantizeLinear"}
        self.quantized = frozenset(n.input[0] for n in nodes if n.op_type == "QuantizeLinear")
        self.dequantized = frozenset(
            node.output[0]
            for node in nodes
            if node.op_type == "DequantizeLinear" and node.input[0] in codes
        )

    @property
    def inputs(self) -> Signature:
        """Its inputs, as `check_signature` compares them."""
        return {tensor.name: _signature(tensor) for tensor in self._model.graph.input}

    @property
    def outputs(self) -> Signature:
        """Its outputs, as `check_signature` compares them."""
        return {tensor.name: _signature(tensor) for tensor in self._model.graph.output}

    def initializer(self, name: str) -> Array | None:
        """Values of an initializer in its own dtype, or None if there is none of this name."""
        import onnx

        if name not in self._initializers:
            return None
        found: Array = onnx.numpy_helper.to_array(self._initializers[name], str(self._dir))
        return found

    def session(self, replaced: Mapping[str, Array]) -> ReferenceSession:
        """Start ONNX Runtime on the graph.

        Args:
            replaced: Initializers that get these values instead.
        """
        import onnx
        import onnxruntime

        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        graph = model.graph
        # As inputs they need no copy inside the graph, whose size protobuf limits to 2 GB.
        for name, values in replaced.items():
            graph.initializer.remove(self._initializers[name])
            kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
            graph.input.append(onnx.helper.make_tensor_value_info(name, kind, values.shape))
        observed = sorted(self.quantized | self.dequantized)
        graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in observed)

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # Its warnings speak of speed.
        # Else it fuses Q/DQ pairs into slow integer kernels (8 times slower, measured 2026-11-24).
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._dir.resolve())
        )
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return ReferenceSession(session, replaced)


class ReferenceSession:
    """A session that returns all outputs by name, the observed tensors among them."""

    def __init__(self, session: Any, replaced: Mapping[str, Array]) -> None:
        self._session = session
        self._replaced = replaced
        self._names = [tensor.name for tensor in session.get_outputs()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Compute all outputs and observed tensors."""
        values = self._session.run(self._names, {**feeds, **self._replaced})
        return dict(zip(self._names, values, strict=True))


def _signature(tensor: onnx.ValueInfoProto) -> tuple[str, tuple[int, ...]]:
    """Dtype name and shape of a graph input or output."""
    import onnx

    kind = tensor.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    shape = (dim.dim_value if dim.HasField("dim_value") else ANY for dim in kind.shape.dim)
    return dtype.name, tuple(shape)
