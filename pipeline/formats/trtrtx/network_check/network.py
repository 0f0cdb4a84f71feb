"""A parsed TensorRT-RTX network, and how its layers are read from Python.

`network.get_layer(i)` returns a bare `ILayer`; the attributes of its kind appear once its
`__class__` is set to the class of that kind (TensorRT's documented way).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.formats.trtrtx.network_check.errors import CheckError

log = logging.getLogger(__name__)

LAYER_CLASSES: Mapping[str, str] = {
    "ACTIVATION": "IActivationLayer",
    "ATTENTION_INPUT": "IAttentionInputLayer",
    "ATTENTION_OUTPUT": "IAttentionOutputLayer",
    "CAST": "ICastLayer",
    "CONCATENATION": "IConcatenationLayer",
    "CONSTANT": "IConstantLayer",
    "DEQUANTIZE": "IDequantizeLayer",
    "ELEMENTWISE": "IElementWiseLayer",
    "FILL": "IFillLayer",
    "GATHER": "IGatherLayer",
    "KV_CACHE_UPDATE": "IKVCacheUpdateLayer",
    "MATRIX_MULTIPLY": "IMatrixMultiplyLayer",
    "QUANTIZE": "IQuantizeLayer",
    "REDUCE": "IReduceLayer",
    "ROTARY_EMBEDDING": "IRotaryEmbeddingLayer",
    "SHAPE": "IShapeLayer",
    "SHUFFLE": "IShuffleLayer",
    "SLICE": "ISliceLayer",
    "SQUEEZE": "ISqueezeLayer",
    "UNARY": "IUnaryLayer",
    "UNSQUEEZE": "IUnsqueezeLayer",
}
"""`LayerType` name -> class, for the kinds that the check knows: all that RTX 1.7.1's parser makes
of our decoder graph (dumped 2026-11-24)."""

NUMPY_NAMES: Mapping[str, str] = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "FLOAT": "float32",
    "FP8": "float8_e4m3fn",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
}
"""TensorRT dtype -> NumPy's (or ml_dtypes') name of it, for the dtypes that the check knows."""


@dataclass(frozen=True)
class Layer:
    """One layer: its kind (`LayerType` name) and the layer with its attributes readable.

    The kind is kept apart because some classes hide `ILayer.type` behind an attribute of their own.
    """

    kind: str
    layer: Any

    @property
    def name(self) -> str:
        return str(self.layer.name)

    @property
    def inputs(self) -> list[Any]:
        """Input tensors; None where an optional one is absent."""
        return [self.layer.get_input(i) for i in range(self.layer.num_inputs)]

    @property
    def outputs(self) -> list[Any]:
        return [self.layer.get_output(i) for i in range(self.layer.num_outputs)]

    def __str__(self) -> str:
        return f"{self.kind} layer {self.name!r}"


@dataclass(frozen=True)
class ParsedNetwork:
    """A network together with what must outlive it: its weights lie in the parser's memory."""

    network: Any
    _owners: tuple[Any, ...]


def parse_network(path: Path) -> ParsedNetwork:
    """Parse an ONNX file as the compiler does: strongly typed.

    Raises:
        CheckError: The parser refused it; its own messages are quoted.
    """
    import tensorrt_rtx as trt

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Sends TensorRT's messages to ours; warnings are routine here, hence DEBUG."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.debug("TensorRT-RTX %s: %s", severity.name, message)

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        faults = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise CheckError(
            f"TensorRT-RTX {trt.__version__} cannot parse {path}: {'; '.join(faults)}; "
            "change the graph to what this version supports"
        )
    return ParsedNetwork(network, (logger, builder, parser))


def layers_of(network: Any) -> Iterator[Layer]:
    """All layers, in the network's order, which is not an order of execution.

    A layer of a kind that `LAYER_CLASSES` lacks comes as a bare `ILayer`.
    """
    import tensorrt_rtx as trt

    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = layer.type.name
        if kind in LAYER_CLASSES:
            layer.__class__ = getattr(trt, LAYER_CLASSES[kind])
        yield Layer(kind, layer)
