"""What a precision is: everything that differs between one and another.

    spec = quant_spec("fp8")
    weights = spec.dequantize(codes, scale)

A precision is one module of this package that has a line `SPEC = ...`, and `KIND = ...` (the
settings class of its quantizer) where recipes can choose it. Code outside this package asks a
`QuantSpec`, and never compares a precision's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.core.errors import Fault
from pipeline.core.settings import marked_modules, read_mark
from pipeline.model.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_MARK = "SPEC"


class OnnxWriter(Protocol):
    """A graph under construction, which an ONNX pattern writes into."""

    @property
    def dtype(self) -> int:
        """ONNX element type of the activations."""

    def op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Append a node with one output, and return its name."""

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """Add a small tensor, once, and return its name."""


@dataclass(frozen=True, kw_only=True)
class OnnxPattern:
    """Nodes around a MatMul by which a compiler recognizes the precision.

    Attributes:
        weight: (graph, stored codes, weight scale, columns that share one, 0 for all) -> the weight
            in the activations' type.
        input: (graph, module, input, input scale) -> the rounded input in that type.
        operands: What TensorRT-RTX calls the type of the stored weight in a compiled plan, and of
            the input, where `input` rounds it.
        codes: Stored codes -> those of the graph, where the type of their bytes is another one.
    """

    weight: Callable[[OnnxWriter, str, str, int], str]
    input: Callable[[OnnxWriter, str, str, np.float32], str] | None
    operands: str
    codes: Callable[[NDArray[Any]], NDArray[Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """A precision of a linear's weights and activations.

    Attributes:
        name: Of its module, of its option in conf/quantizer, and in variants.
        title: For people, such as `FP8`.
        weight_dtype: Type of the stored weight, by its NumPy (or ml_dtypes) name.
        weight_name: End of the name that a linear's weight is stored under.
        packed: Weights in one element of that type.
        group_sizes: Columns of a row that share one bfloat16 scale, the size wanted most first; a
            model has the first that divides the columns of all its linears. Empty for one float32
            scale for the whole tensor.
        scales: Ends of the names of the tensors stored beside a weight.
        code_max: Largest finite code: a scale is amax / `code_max`. 0 without scales.
        relative_step: Rounding error of a weight, relative to its value, at most.
        absolute_step: The same of the smallest values, in units of the scale.
        max_lost_share: Of a linear's non-zero weights at most so many may round to zero.
        quant_algo: Its name in `hf_quant_config.json` and in TensorRT-LLM; None for 16-bit.
        declared: What the checkpoint declares instead, in `config.json`: method and format.
        operands: Operand type of its multiplication, one of `Target.tflops`.
        native_sm: Least compute capability x 10 that multiplies these operands.
        dequantize: Stored codes and scale -> weights in float32, for all that computes with them.
        round_input: (x, calibrated scale) -> what is multiplied; None where activations stay.
        modelopt_config: (patterns of linears that stay 16-bit, columns that share a scale) ->
            config for `mtq.quantize`.
        onnx: Its pattern in a graph.
    """

    name: str
    title: str
    weight_dtype: str
    weight_name: str = "weight"
    packed: int = 1
    group_sizes: tuple[int, ...] = ()
    scales: tuple[str, ...] = ()
    code_max: float = 0.0
    relative_step: float = 0.0
    absolute_step: float = 0.0
    max_lost_share: float = 0.0
    quant_algo: str | None
    declared: str | None = None
    operands: str
    native_sm: int
    dequantize: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    round_input: Callable[[torch.Tensor, float], torch.Tensor] | None = None
    modelopt_config: Callable[[Sequence[str], int | None], dict[str, Any]] | None = None
    onnx: OnnxPattern | None = None

    def group_size(self, spec: ModelSpec) -> int | None:
        """Columns that share a scale in this model; None: one for all, or no size fits."""
        columns = {size for _, size in spec.modules.values()}
        for size in self.group_sizes:
            # TensorRT-RTX 1.7.1 unpacks a row of a single group while it compiles (2026-11-30).
            if all(one % size == 0 and one > size for one in columns):
                return size
        return None

    def linear_bytes(self, rows: int, columns: int, group: int | None) -> int:
        """Bytes that a linear takes, its scales included."""
        codes = rows * columns // self.packed * _WEIGHT_BYTES[self.weight_dtype]
        if not self.group_sizes:
            return codes + _SCALE_BYTES * len(self.scales)
        return codes + 2 * rows * columns // (group or self.group_sizes[-1]) + _SHAPE_BYTES

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor that holds a weight of this shape."""
        return (*shape[:-1], shape[-1] // self.packed)


_WEIGHT_BYTES = {"bfloat16": 2, "float8_e4m3fn": 1, "int32": 4}
_SCALE_BYTES = 4  # float32
_SHAPE_BYTES = 16  # a packed weight's rows and columns, int64


@dataclass(frozen=True, kw_only=True)
class KvCacheDtype:
    """A type of the KV cache; 16-bit ones have no `quant_algo` and need no calibrated scales."""

    title: str
    bytes_per_element: int
    quant_algo: str | None = None

    @property
    def suffix(self) -> str:
        return f"-kv{8 * self.bytes_per_element}" if self.quant_algo else ""


SHAPING_CODE = ("pipeline.core.safetensors_files", "pipeline.model", "pipeline.quant")
"""For the code of stages: every line of these may shape a checkpoint, or what reads one."""

FP8_E4M3_MAX = 448.0
"""Largest finite E4M3 value (OCP 8-bit Floating Point Specification, table 1)."""

KV_CACHE_DTYPES = {
    "fp8": KvCacheDtype(title="FP8", bytes_per_element=1, quant_algo="FP8"),
    "bfloat16": KvCacheDtype(title="16-bit", bytes_per_element=2),
    "float16": KvCacheDtype(title="16-bit", bytes_per_element=2),
}
"""`kv_cache_dtype` -> what it is. Every checkpoint holds the scales of an FP8 cache."""


def quant_specs() -> dict[str, QuantSpec]:
    """Every precision, by name."""
    return {name: quant_spec(name) for name in marked_modules(__package__, _MARK)}


def quant_spec(name: str) -> QuantSpec:
    """One precision; KeyError if there is none of this name."""
    found: QuantSpec = read_mark(marked_modules(__package__, _MARK)[name], _MARK)
    return found


def select(patterns: Sequence[str], modules: Iterable[str]) -> tuple[str, ...]:
    """Names of the modules that match any pattern (fnmatch, case matters), in model order."""
    return tuple(name for name in modules if any(fnmatchcase(name, each) for each in patterns))


def quantizer_faults(precision: QuantSpec, patterns: Sequence[str], spec: ModelSpec) -> list[Fault]:
    """Why a model cannot be quantized so, before anything is downloaded."""
    faults = keep_16bit_faults(patterns, spec)
    if precision.group_sizes and precision.group_size(spec) is None:
        sizes = ", ".join(map(str, precision.group_sizes))
        message = f"no group of {sizes} columns divides all linears of this model"
        faults.append(Fault("quantizer", f"{message}; choose another precision"))
    return faults


def keep_16bit_faults(patterns: Sequence[str], spec: ModelSpec) -> list[Fault]:
    """Patterns that match nothing, and choices that split what every runtime fuses."""
    faults = [
        Fault(
            f"quantizer.keep_16bit[{index}]",
            f"{pattern!r} matches no linear of this model; names look like "
            f"{next(iter(spec.modules))} (lm_head always stays 16-bit)",
        )
        for index, pattern in enumerate(patterns)
        if not select([pattern], spec.modules)
    ]
    for names in spec.fused_modules().values():
        kept = select(patterns, names)
        if kept and len(kept) < len(names):
            quantized = ", ".join(name for name in names if name not in kept)
            message = (
                f"{kept[0]} would stay 16-bit and {quantized} be quantized; runtimes merge them "
                "into one GEMM, which has one precision: keep all of them or none"
            )
            # One is enough: a pattern that splits one layer splits all of them.
            return [*faults, Fault("quantizer.keep_16bit", message)]
    return faults
