"""Compares a parsed network with the float32 twin of its graph, step by step.

Both sides compute the same decoder: a ragged, right-padded prefill, two decode steps, and at the
end of the context a step of one token and one of several, on caches that start full of stale values
as a reused cache is. At the end a sliding window hides the first keys, if the graph has one.

The trouble with FP8: two correct float32 programs differ by 1e-7, that flips an E4M3 code now and
then, a flip is worth 6 % of its value, and all layers behind amplify it. A tolerance that bears
flips hides faults. So nothing may flip: what a quantizer reads is compared like an output, and then
replaced by what ONNX Runtime's quantizer read. Both now round the same numbers, and every stretch
between two quantizers is judged by itself, at float32 accuracy. It also names the place: the first
tensor that differs is right behind the fault.

Constants that are stored in 16 bit for RTX and in 32 bit for the CPU (the rotary tables) must be
each other's rounding, and the twin is run with the rounded ones.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.formats.trtrtx.network_check.errors import CheckError
from pipeline.formats.trtrtx.network_check.guard import guard_network
from pipeline.formats.trtrtx.network_check.interface import DecoderInterface, check_signature
from pipeline.formats.trtrtx.network_check.interpreter import Constant, NetworkInterpreter
from pipeline.formats.trtrtx.network_check.network import NUMPY_NAMES, parse_network
from pipeline.formats.trtrtx.network_check.reference import ReferenceModel
from pipeline.formats.trtrtx.network_check.rules import Array

TOLERANCE = 1e-4
"""Largest difference, relative to the value's own magnitude plus the tensor's root mean square.

The worst seen (2026-11-24): 4.3e-6 on two layers of SmolLM2, 4.3e-5 on all thirty, 5.3e-6 on two
layers of Phi-3-mini's shape; no FP8 code flipped in any of them.
"""

_PROMPT_LENGTHS = (9, 5, 1)
"""Tokens of the three rows of the prefill: a full one, a padded one, the shortest there is."""
_DECODE_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far two sides are apart, over all tensors of one sort and all steps.

    Attributes:
        values: How many numbers were compared.
        max_relative: Largest difference of two values, relative as `TOLERANCE` says.
        mean_relative: Mean of the same over the values of a tensor, then over tensors.
    """

    values: int
    max_relative: float
    mean_relative: float


@dataclass(frozen=True, kw_only=True)
class NetworkCheckResult:
    """A parsed network that passed.

    Attributes:
        tensorrt_rtx: Version of the parser.
        onnxruntime: Version of the reference.
        layer_kinds: How many layers of each kind were evaluated.
        constants_equal: How many constants of the network equal the twin's initializers.
        constants_rounded: Those that are the 16-bit rounding of the twin's.
        differences: `logits`, `caches`, and, in FP8 graphs, `quantizer_inputs` and
            `quantized_values`.
        tolerance: Largest `max_relative` that passes.
        seconds: What the check took.
    """

    tensorrt_rtx: str
    onnxruntime: str
    layer_kinds: Mapping[str, int]
    constants_equal: int
    constants_rounded: tuple[str, ...]
    differences: Mapping[str, Difference]
    tolerance: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_network(
    onnx_rtx: Path, onnx_cpu: Path, *, interface: DecoderInterface, seed: int = 0
) -> NetworkCheckResult:
    """Check that TensorRT-RTX's parser reads `onnx_rtx` as ONNX Runtime reads `onnx_cpu`.

    Args:
        onnx_rtx: Decoder graph for RTX, or a cut of its first layers with the real weights.
        onnx_cpu: The same graph with float32 activations.
        interface: Sizes of that graph.
        seed: Of the token ids and the stale cache values.

    Raises:
        CheckError: They differ, or the network holds something that this check does not know.
    """
    import onnxruntime
    import tensorrt_rtx

    started = time.perf_counter()
    parsed = parse_network(onnx_rtx)
    kinds = guard_network(parsed.network, interface)
    interpreter = NetworkInterpreter(parsed.network)

    reference = ReferenceModel(onnx_cpu)
    check_signature("the float32 twin's inputs", reference.inputs, interface.inputs("float32"))
    check_signature("the float32 twin's outputs", reference.outputs, interface.outputs("float32"))
    if interpreter.quantized != reference.quantized:
        names = sorted(interpreter.quantized ^ reference.quantized)
        raise CheckError(
            f"the network and the float32 twin quantize different tensors: {', '.join(names)}"
        )
    equal, rounded = _compare_constants(interpreter, reference, interface.dtype)
    session = reference.session(rounded)

    comparison = _Comparison()
    feeds_network = feeds_twin = _stale_caches(interface, seed)
    for step, tokens in _steps(interface, seed):
        wanted = session.run({**tokens, **feeds_twin})
        observer = _Observer(comparison, step, reference, wanted)
        got = interpreter.run({**tokens, **feeds_network}, observer)
        observer.finish()
        for name in interface.outputs("float32"):
            sort = "logits" if name == "logits" else "caches"
            comparison.add(sort, f"{name} ({step})", got[name], wanted[name])
        feeds_network = _as_past(got, interface)
        feeds_twin = _as_past(wanted, interface)
    return NetworkCheckResult(
        tensorrt_rtx=tensorrt_rtx.__version__,
        onnxruntime=onnxruntime.__version__,
        layer_kinds=kinds,
        constants_equal=equal,
        constants_rounded=tuple(sorted(rounded)),
        differences=comparison.differences(),
        tolerance=TOLERANCE,
        seconds=round(time.perf_counter() - started, 2),
    )


def _compare_constants(
    interpreter: NetworkInterpreter, reference: ReferenceModel, dtype: str
) -> tuple[int, dict[str, Array]]:
    """Hold each constant of the network against the twin's initializer of that name.

    Constants that the parser made of attributes have no namesake; the comparison of values covers
    them.

    Returns:
        How many are equal, and the values of those that are the twin's rounded to `dtype`.
    """
    equal = 0
    rounded: dict[str, Array] = {}
    for name, constant in interpreter.constants.items():
        wanted = reference.initializer(name)
        if wanted is None:
            continue
        if _is_equal(constant, wanted):
            equal += 1
        elif NUMPY_NAMES.get(constant.dtype) == dtype and _is_rounding(
            constant.values, wanted, dtype
        ):
            rounded[name] = constant.values
        else:
            raise CheckError(
                f"the constant {name} is {_describe(constant.values)} in the network and "
                f"{_describe(wanted)} in the float32 twin; the two graphs were not written from "
                "the same checkpoint, or the parser changed it"
            )
    return equal, rounded


def _is_equal(constant: Constant, wanted: Array) -> bool:
    """Same dtype, shape and values (bits, for FP8)."""
    import numpy as np

    values = constant.values
    if NUMPY_NAMES.get(constant.dtype) != wanted.dtype.name:
        return False
    if constant.dtype == "FP8":
        values, wanted = values.view(np.uint8), wanted.view(np.uint8)
    return np.array_equal(values, wanted)


def _is_rounding(values: Array, wanted: Array, dtype: str) -> bool:
    """Whether `values` are float32 `wanted` rounded to `dtype`.

    Both may have been rounded from float64, so the last bit of `wanted` may be off by one.
    """
    import numpy as np

    if wanted.dtype != np.float32 or values.shape != wanted.shape:
        return False
    low, high = (np.nextafter(wanted, np.float32(end)).astype(dtype) for end in (-np.inf, np.inf))
    return bool(np.all((low.astype(np.float32) <= values) & (values <= high.astype(np.float32))))


def _describe(values: Array) -> str:
    first = ", ".join(str(value) for value in values.reshape(-1)[:3])
    return f"{values.dtype} {list(values.shape)} ({first}, ...)"


def _stale_caches(interface: DecoderInterface, seed: int) -> dict[str, Array]:
    """Caches as an earlier request left them: values within +-2, exact in every 16-bit format."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(-128, 128, (len(_PROMPT_LENGTHS), *shape[1:]), np.int8) / np.float32(64)
        for name, (_, shape) in interface.inputs("float32").items()
        if name.startswith("past_")
    }


def _as_past(outputs: Mapping[str, Array], interface: DecoderInterface) -> dict[str, Array]:
    """This step's present caches under the names of the next step's past caches."""
    return {f"past_{name}": outputs[f"present_{name}"] for name in interface.cache_names}


def _steps(interface: DecoderInterface, seed: int) -> Iterator[tuple[str, dict[str, Array]]]:
    """Name and token inputs of each step."""
    import numpy as np

    rng = np.random.default_rng(seed + 1)
    lengths = np.array(_PROMPT_LENGTHS, np.int64)
    rows, longest = len(lengths), max(_PROMPT_LENGTHS)
    needed = longest + _DECODE_STEPS
    if interface.context < needed:
        raise CheckError(f"the check needs a context of {needed} tokens, got {interface.context}")
    columns = np.arange(longest)
    prompt = rng.integers(0, interface.vocab_size, (rows, longest))
    yield (
        "prefill",
        {
            "input_ids": np.where(columns < lengths[:, None], prompt, 0),
            "write_indices": np.zeros(rows, np.int64),
            # All real positions; where a row has ended, its last one again.
            "logits_index": np.minimum(columns, lengths[:, None] - 1),
        },
    )
    starts = {f"decode {step + 1}": lengths + step for step in range(_DECODE_STEPS)}
    starts["end of context"] = interface.context - 1 - np.arange(rows, dtype=np.int64)
    for step, start in starts.items():
        yield (
            step,
            {
                "input_ids": rng.integers(0, interface.vocab_size, (rows, 1)),
                "write_indices": start,
                "logits_index": np.zeros((rows, 1), np.int64),
            },
        )
    yield (
        "chunk at end of context",
        {
            "input_ids": rng.integers(0, interface.vocab_size, (rows, longest)),
            "write_indices": interface.context - longest - np.arange(rows, dtype=np.int64),
            "logits_index": np.tile(columns, (rows, 1)),
        },
    )


@dataclass
class _Comparison:
    """Collects differences by sort; the first tensor beyond the tolerance ends the check."""

    _found: dict[str, list[tuple[int, float, float]]] = field(default_factory=dict)

    def add(self, sort: str, what: str, got: Array, wanted: Array) -> None:
        """Compare one tensor.

        Raises:
            CheckError: Another shape, or further apart than the tolerance.
        """
        import numpy as np

        if got.shape != wanted.shape:
            raise CheckError(f"{what} is {got.shape} in the network, {wanted.shape} in the twin")
        rms = np.sqrt(np.vdot(wanted, wanted) / wanted.size) or 1.0
        unequal = got != wanted  # Most of a cache is equal: it was not written.
        got, wanted = got[unequal], wanted[unequal]
        relative = np.abs(got - wanted) / (rms + np.abs(wanted))
        largest, mean = float(relative.max(initial=0)), float(relative.sum()) / unequal.size
        if not largest <= TOLERANCE:  # NaN fails too.
            raise CheckError(
                f"{what} differs between the parsed network and ONNX Runtime: by up to "
                f"{largest:.3g} of its magnitude, {TOLERANCE:g} is allowed; the parser reads "
                "something between this tensor and the quantizers before it in another way"
            )
        self._found.setdefault(sort, []).append((unequal.size, largest, mean))

    def differences(self) -> dict[str, Difference]:
        """One entry per sort."""
        return {
            sort: Difference(
                values=sum(size for size, _, _ in found),
                max_relative=max(largest for _, largest, _ in found),
                mean_relative=sum(mean for _, _, mean in found) / len(found),
            )
            for sort, found in self._found.items()
        }


@dataclass
class _Observer:
    """Watches the network's tensors during one step; quantizers get the reference's input."""

    comparison: _Comparison
    step: str
    reference: ReferenceModel
    wanted: Mapping[str, Array]
    _seen: set[str] = field(default_factory=set)

    def __call__(self, name: str, value: Array) -> Array:
        if name in self.reference.quantized:
            sort = "quantizer_inputs"
        elif name in self.reference.dequantized:
            sort = "quantized_values"
        else:
            return value
        self._seen.add(name)
        self.comparison.add(sort, f"{name} ({self.step})", value, self.wanted[name])
        return self.wanted[name]

    def finish(self) -> None:
        """Demand that the network has all tensors that the reference shows."""
        if missing := (self.reference.quantized | self.reference.dequantized) - self._seen:
            raise CheckError(f"the network has no tensor {', '.join(sorted(missing))}")
