"""Reads the values of a constant layer, bfloat16 and FP8 included.

TensorRT's binding returns the weights of a constant as a NumPy array where NumPy has the dtype, and
an opaque `Weights` object otherwise (1.7.1: BF16 and FP8). Of such an object the address of its
`nvinfer1::Weights` struct is asked through pybind11's interoperability method
`_pybind11_conduit_v1_` (pybind11 2.13.6 and later, its release notes); the struct is TensorRT's
public ABI (`NvInferRuntimeBase.h`: type, pointer, count). Type and count must equal what the
binding says, or nothing is read.
"""

from __future__ import annotations

import ctypes
import re
from typing import TYPE_CHECKING, Any

from pipeline.formats.trtrtx.network_check.errors import CheckError
from pipeline.formats.trtrtx.network_check.network import NUMPY_NAMES, Layer

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WEIGHTS_TYPE_NAME = b"N8nvinfer17WeightsE"
"""`typeid(nvinfer1::Weights).name()` in the Itanium C++ ABI."""


class _TypeInfo(ctypes.Structure):
    """A `std::type_info` as the conduit uses it: only its name is compared."""

    _fields_ = (("vtable", ctypes.c_void_p), ("name", ctypes.c_char_p))


class _Weights(ctypes.Structure):
    """`nvinfer1::Weights`."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("values", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


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
