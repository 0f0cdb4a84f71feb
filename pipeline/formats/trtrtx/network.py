"""A parsed TensorRT-RTX network: how it is read from Python, and the guard of every build.

A parser may drop what it does not support without a word: TensorRT-RTX 1.7.1 parses an Attention
node with `nonpad_kv_seqlen` and `is_causal=1` into a layer without mask and lengths whose causal
kind is UPPER_LEFT, which would build, and attend to the wrong keys. So the *parsed* network, the
last thing before the compiler that can still be read, is checked twice: by `guard_network` in every
build, and by `network_check`, a cut of two layers, once per architecture, RTX version and graph.

The binding returns the weights of a constant as a NumPy array where NumPy has the dtype, and an
opaque `Weights` object otherwise (1.7.1: BF16, FP8 and INT4). Of such an object the address of its
`nvinfer1::Weights` struct is asked through pybind11's `_pybind11_conduit_v1_` (2.13.6 and later).
The struct is TensorRT's public ABI (`NvInferRuntimeBase.h`: type, pointer, count). Type and count
must equal what the binding says, or nothing is read.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.core.errors import PipelineError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class CheckError(PipelineError):
    """What TensorRT-RTX's parser made of the graph is not, or may not be, what the graph says."""


NUMPY_NAMES: Mapping[str, str] = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "FLOAT": "float32",
    "FP8": "float8_e4m3fn",
    "HALF": "float16",
    "INT4": "int4",
    "INT32": "int32",
    "INT64": "int64",
}
"""TensorRT dtype -> NumPy's (or ml_dtypes') name of it, for all that RTX 1.7.1's parser makes of
our decoder graph (dumped 2026-11-24)."""


class Layer(NamedTuple):
    """One layer and its `LayerType`, which some classes hide; a tensor that is absent is None."""

    kind: str
    layer: Any
    inputs: list[Any]
    outputs: list[Any]

    def __str__(self) -> str:
        return f"{self.kind} layer {str(self.layer.name)!r}"


class ParsedNetwork(NamedTuple):
    """Weights of a network lie in its parser's memory: `owners` must outlive it."""

    network: Any
    builder: Any
    owners: tuple[Any, ...]


def parse_network(path: Path) -> ParsedNetwork:
    """Parse an ONNX file, strongly typed."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        faults = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        said = f"TensorRT-RTX {trt.__version__} cannot parse {path}: {'; '.join(faults)}"
        raise CheckError(f"{said}; change the graph to what it supports")
    return ParsedNetwork(network, builder, (logger, parser))


def layers_of(network: Any) -> Iterator[Layer]:
    """All layers, in the network's order, which is none of execution.

    Attributes of a kind appear once `__class__` is that kind's (TensorRT's documented way).
    """
    import tensorrt_rtx as trt

    classes = {name.lower(): name for name in dir(trt)}  # ELEMENTWISE -> IElementWiseLayer
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = layer.type.name
        if name := classes.get(f"i{kind.replace('_', '').lower()}layer"):
            layer.__class__ = getattr(trt, name)
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        yield Layer(kind, layer, inputs, [layer.get_output(i) for i in range(layer.num_outputs)])


_PINNED = "install the version that the extra `build` pins"
_WEIGHTS_TYPE_NAME = b"N8nvinfer17WeightsE"
"""`typeid(nvinfer1::Weights).name()` in the Itanium C++ ABI."""


class _TypeInfo(ctypes.Structure):
    """A `std::type_info` as the conduit uses it: only its name is compared."""

    _fields_ = (("vtable", ctypes.c_void_p), ("name", ctypes.c_char_p))


class _Weights(ctypes.Structure):
    """`nvinfer1::Weights`."""

    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def constant_values(layer: Layer) -> NDArray[Any]:
    """Values of a CONSTANT layer, in their own dtype and shape; a copy."""
    import ml_dtypes
    import numpy as np

    weights = layer.layer.weights
    shape = tuple(layer.layer.shape)
    if isinstance(weights, np.ndarray):
        return weights.reshape(shape).copy()
    dtype = NUMPY_NAMES.get(weights.dtype.name)
    if dtype is None:
        raise CheckError(f"{layer} holds {weights.dtype.name}: add it to NUMPY_NAMES and the rules")
    header = _struct_of(weights, layer)
    if header.type != int(weights.dtype) or header.count != weights.size or not header.values:
        raise CheckError(f"{layer}: this TensorRT-RTX lays out weights in another way; {_PINNED}")
    if dtype == "int4":  # two in a byte, the first in the low bits; `nbytes` is wrong (1.7.1)
        raw = ctypes.string_at(header.values, -(-weights.size // 2))
        pairs = np.frombuffer(raw, np.int8)
        codes = np.stack([(pairs << 4).astype(np.int8) >> 4, pairs >> 4], axis=-1)
        return codes.reshape(-1)[: weights.size].astype(ml_dtypes.int4).reshape(shape)
    raw = ctypes.string_at(header.values, weights.nbytes)
    return np.frombuffer(raw, np.dtype(dtype)).reshape(shape)


def _struct_of(weights: Any, layer: Layer) -> _Weights:
    """The C++ struct behind a `Weights` object, which must outlive the result."""
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, pointer, text, pointer)(
        ("PyCapsule_New", ctypes.pythonapi)
    )
    get_pointer = ctypes.PYFUNCTYPE(pointer, ctypes.py_object, text)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    type_info = _TypeInfo(None, _WEIGHTS_TYPE_NAME)
    capsule = new_capsule(ctypes.addressof(type_info), b"St9type_info", None)
    # The ABI tag that the conduit wants stands in the name of a class attribute.
    names = (
        re.fullmatch(r"__pybind11_module_local_v\d+_(.+)__", one) for one in dir(type(weights))
    )
    abi = next((match[1].encode() for match in names if match), b"")
    found = weights._pybind11_conduit_v1_(abi, capsule, b"raw_pointer_ephemeral")
    if found is None:
        raise CheckError(f"{layer}: TensorRT-RTX hides where its weights lie; {_PINNED}")
    return _Weights.from_address(get_pointer(found, _WEIGHTS_TYPE_NAME))


Shapes = dict[str, tuple[int, ...]]
"""Tensor name -> shape, -1 for dynamic dimensions."""


def graph_shapes(graph: Path) -> tuple[Shapes, Shapes]:
    """Inputs and outputs of an ONNX file, whose weights are not read."""
    import onnx

    def shapes(tensors: Any) -> Shapes:
        dims = {tensor.name: tensor.type.tensor_type.shape.dim for tensor in tensors}
        return {name: tuple(one.dim_value or -1 for one in dim) for name, dim in dims.items()}

    model = onnx.load(graph, load_external_data=False).graph
    return shapes(model.input), shapes(model.output)


_LAYERS_OF_EACH = {
    "ATTENTION_INPUT": 1,
    "ATTENTION_OUTPUT": 1,
    "KV_CACHE_UPDATE": 2,
    "ROTARY_EMBEDDING": 2,
}
"""Kind -> layers of it in one decoder layer."""


def guard_network(network: Any, graph: Path) -> Mapping[str, int]:
    """Check interface, attention layers and cache updates of a parsed decoder; counts its layers.

    Its inputs and outputs must be those of an ONNX file: its own, or that of the same decoder.

    Raises:
        CheckError: Something is missing, left over or different; names the layer and the cause.
    """
    layers = list(layers_of(network))
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    own_inputs, own_outputs = graph_shapes(graph)
    _check_shapes("inputs", inputs, own_inputs)
    _check_shapes("outputs", outputs, own_outputs)
    read = {tensor.name for layer in layers for tensor in layer.inputs if tensor is not None}
    if unread := sorted(tensor.name for tensor in inputs if tensor.name not in read):
        dropped = f"no layer of the network reads the input {', '.join(unread)}"
        raise CheckError(f"{dropped}; see which node of the graph the parser dropped")
    for layer in layers:
        if layer.kind in ("ATTENTION_INPUT", "ATTENTION_OUTPUT"):
            _check_attention(layer)
    kinds = Counter(layer.kind for layer in layers)
    decoders = sum(one.name.startswith("past_key") for one in inputs)
    for kind, wanted in _LAYERS_OF_EACH.items():
        if kinds[kind] != wanted * decoders:
            got = f"the network has {kinds[kind]} {kind} layers, wanted {wanted * decoders}"
            raise CheckError(f"{got}; see which node the parser took apart, or the graph lacks")
    return dict(sorted(kinds.items()))


def _check_shapes(what: str, tensors: list[Any], wanted: Shapes) -> None:
    got = {one.name: tuple(one.shape) for one in tensors}
    faults = [
        f"{name} is {got.get(name, 'missing')}, wanted {wanted.get(name, 'none')}"
        for name in sorted({*got, *wanted})
        if got.get(name) != wanted.get(name)
    ]
    if faults:
        differ = f"the network's {what} are not the decoder's: {'; '.join(faults)}"
        raise CheckError(f"{differ}; see what the parser dropped")


def _check_attention(layer: Layer) -> None:
    mask, causal = layer.layer.attention.mask, layer.layer.attention.causal_kind.name
    if mask is None or mask.dtype.name != "BOOL" or causal != "NONE":
        got = "no mask" if mask is None else f"a mask of {mask.dtype.name}"
        raise CheckError(
            f"{layer} has {got}, wanted BOOL, and causal kind {causal}, wanted NONE: the parser "
            "drops `nonpad_kv_seqlen`, aligns `is_causal=1` with the first keys; use a bool mask"
        )
