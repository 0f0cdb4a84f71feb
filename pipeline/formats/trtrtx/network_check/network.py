"""A parsed TensorRT-RTX network, and how its layers and constants are read from Python.

`network.get_layer(i)` returns a bare `ILayer`; the attributes of its kind appear once its
`__class__` is set to the class of that kind (TensorRT's documented way).

The binding returns the weights of a constant as a NumPy array where NumPy has the dtype, and an
opaque `Weights` object otherwise (1.7.1: BF16 and FP8). Of such an object the address of its
`nvinfer1::Weights` struct is asked through pybind11's interoperability method
`_pybind11_conduit_v1_` (pybind11 2.13.6 and later, its release notes); the struct is TensorRT's
public ABI (`NvInferRuntimeBase.h`: type, pointer, count). Type and count must equal what the
binding says, or nothing is read.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import PipelineError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class CheckError(PipelineError):
    """What TensorRT-RTX's parser made of the graph is not, or may not be, what the graph says.

    Also raised for anything that the network check does not know: it fails closed.
    """


NUMPY_NAMES: Mapping[str, str] = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "FLOAT": "float32",
    "FP8": "float8_e4m3fn",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
}
"""TensorRT dtype -> NumPy's (or ml_dtypes') name of it, for the dtypes that the check knows: all
that RTX 1.7.1's parser makes of our decoder graph (dumped 2026-11-24)."""


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
    """A network, its builder, and what must outlive both: weights lie in the parser's memory."""

    network: Any
    builder: Any
    _owners: tuple[Any, ...]


def parse_network(path: Path) -> ParsedNetwork:
    """Parse an ONNX file, strongly typed.

    Raises:
        CheckError: The parser refused it; its own messages are quoted.
    """
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        faults = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise CheckError(
            f"TensorRT-RTX {trt.__version__} cannot parse {path}: {'; '.join(faults)}; "
            "change the graph to what this version supports"
        )
    return ParsedNetwork(network, builder, (logger, parser))


def layers_of(network: Any) -> Iterator[Layer]:
    """All layers, in the network's order, which is not an order of execution."""
    import tensorrt_rtx as trt

    classes = {name.lower(): name for name in dir(trt)}  # ELEMENTWISE -> IElementWiseLayer
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = layer.type.name
        if name := classes.get(f"i{kind.replace('_', '').lower()}layer"):
            layer.__class__ = getattr(trt, name)
        yield Layer(kind, layer)


_WEIGHTS_TYPE_NAME = b"N8nvinfer17WeightsE"
"""`typeid(nvinfer1::Weights).name()` in the Itanium C++ ABI."""


class _TypeInfo(ctypes.Structure):
    """A `std::type_info` as the conduit uses it: only its name is compared."""

    _fields_ = (("vtable", ctypes.c_void_p), ("name", ctypes.c_char_p))


class _Weights(ctypes.Structure):
    """`nvinfer1::Weights`."""

    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def constant_values(layer: Layer) -> NDArray[Any]:
    """Values of a CONSTANT layer, in their own dtype and shape; a copy.

    Raises:
        CheckError: They cannot be read.
    """
    import ml_dtypes  # noqa: F401  registers bfloat16 and float8 with NumPy
    import numpy as np

    weights = layer.layer.weights
    shape = tuple(layer.layer.shape)
    if isinstance(weights, np.ndarray):
        return weights.reshape(shape).copy()
    dtype = NUMPY_NAMES.get(weights.dtype.name)
    if dtype is None:
        raise CheckError(f"{layer} holds {weights.dtype.name}, which the network check cannot read")
    header = _struct_of(weights, layer)
    if header.type != int(weights.dtype) or header.count != weights.size or not header.values:
        raise CheckError(
            f"{layer}: its weights in memory ({header.count} of type {header.type}) are not what "
            f"the binding says ({weights.size} of {weights.dtype}); this TensorRT-RTX version "
            "lays them out in another way"
        )
    raw = ctypes.string_at(header.values, weights.nbytes)
    return np.frombuffer(raw, np.dtype(dtype)).reshape(shape)


def _struct_of(weights: Any, layer: Layer) -> _Weights:
    """The C++ struct behind a `Weights` object, which must outlive the result."""
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype = ctypes.c_void_p
    get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]

    type_info = _TypeInfo(None, _WEIGHTS_TYPE_NAME)
    capsule = new_capsule(ctypes.addressof(type_info), b"St9type_info", None)
    found = weights._pybind11_conduit_v1_(_platform_abi(weights), capsule, b"raw_pointer_ephemeral")
    if found is None:
        raise CheckError(
            f"{layer}: this build of TensorRT-RTX does not show where its {weights.dtype.name} "
            "weights lie; the network check cannot vouch for them"
        )
    return _Weights.from_address(get_pointer(found, _WEIGHTS_TYPE_NAME))


def _platform_abi(weights: Any) -> bytes:
    """The ABI tag that the conduit wants, as found in the name of a class attribute."""
    for name in dir(type(weights)):
        if match := re.fullmatch(r"__pybind11_module_local_v\d+_(.+)__", name):
            return match.group(1).encode()
    return b""
