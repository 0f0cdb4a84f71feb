"""Compares a parsed network with the float32 graph on ONNX Runtime, step by step.

Both sides compute the same decoder: a ragged, right-padded prefill, two decode steps, and at the
end of the context a step of one token and one of several, on caches that start full of stale values
as a reused cache is. At the end a sliding window hides the first keys, if the graph has one.

Two correct float32 programs differ by 1e-7, which flips an E4M3 code now and then, by 6 % of its
value, and all layers behind amplify it. So what a quantizer reads is compared like an output, and
then replaced by what ONNX Runtime's read: every stretch between two quantizers is compared by
itself, at float32 accuracy, and the first tensor that differs is right behind the fault.

Constants that are stored in 16 bit for RTX and in 32 bit for the CPU (the rotary tables) must be
each other's rounding, and the reference is run with the rounded ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.formats.trtrtx.interpreter import Array, NetworkInterpreter
from pipeline.formats.trtrtx.network import (
    CheckError,
    Shapes,
    constant_values,
    graph_shapes,
    guard_network,
    parse_network,
)

TOLERANCE = 1e-4
"""Largest difference, relative to the value's own magnitude plus the tensor's root mean square.

The worst seen (2026-11-24): 4.3e-6 on two layers of SmolLM2, 4.3e-5 on all thirty, 5.3e-6 on two
layers of Phi-3-mini's shape; no FP8 code flipped in any of them.
"""

_PROMPT_LENGTHS = (9, 5, 1)
"""Tokens of the three rows of the prefill: a full one, a padded one, the shortest there is."""
_DECODE_STEPS = 2


Differences = dict[str, dict[str, float]]
"""By sort (`logits`, `caches`, `quantizer_inputs`, `quantized_values`): how many `values` were
compared, and their `max_relative` difference, as `TOLERANCE` says."""


def check_network(onnx_rtx: Path, onnx_cpu: Path) -> dict[str, Any]:
    """Check that TensorRT-RTX's parser reads `onnx_rtx` as ONNX Runtime reads `onnx_cpu`.

    They are one decoder graph, the latter with float32 activations; gives what the report shows.
    """
    started = time.perf_counter()
    parsed = parse_network(onnx_rtx)
    kinds = guard_network(parsed.network, onnx_cpu)
    inputs, outputs = graph_shapes(onnx_cpu)
    interpreter = NetworkInterpreter(parsed.network)
    reference = ReferenceModel(onnx_cpu)
    if names := interpreter.quantized ^ reference.quantized:
        one = f"only one of network and reference quantizes {', '.join(sorted(names))}"
        raise CheckError(f"{one}; see which quantizer the parser dropped or the graph lacks")
    equal, rounded = _compare_constants(interpreter, reference)
    run_reference = reference.start(rounded)
    differences: Differences = {}
    feeds_network = feeds_reference = _stale_caches(inputs)
    for step, tokens in _steps(inputs["past_key.0"][2], outputs["logits"][-1]):
        wanted = run_reference({**tokens, **feeds_reference})
        comparison = _Comparison(step, reference, wanted, differences)
        got = interpreter.run({**tokens, **feeds_network}, comparison.observe)
        comparison.compare_outputs(got)
        feeds_network, feeds_reference = _as_past(got), _as_past({k: wanted[k] for k in outputs})
    return {
        "layer_kinds": kinds,
        "constants_equal": equal,
        "constants_rounded": sorted(rounded),
        "differences": differences,
        "tolerance": TOLERANCE,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _compare_constants(
    interpreter: NetworkInterpreter, reference: ReferenceModel
) -> tuple[int, dict[str, Array]]:
    """Compare each constant of the network with the reference's initializer of that name.

    Returns how many are equal, and the values of those that are the reference's rounded to 16 bit.
    Constants made of attributes have no namesake: the comparison of values covers them.
    """
    equal = 0
    rounded: dict[str, Array] = {}
    for name in interpreter.constants.keys() & reference.initializers.keys():
        values, wanted = constant_values(interpreter.constants[name]), reference.initializer(name)
        same_type = (values.dtype, values.shape) == (wanted.dtype, wanted.shape)
        if same_type and values.tobytes() == wanted.tobytes():
            equal += 1
        elif values.dtype.itemsize == 2 and _is_rounding(values, wanted):
            rounded[name] = values.astype(np.float32)
        else:
            reads = f"the constant {name} is {_describe(values)} in the network"
            raise CheckError(f"{reads}, {_describe(wanted)} in the graph; convert both anew")
    return equal, rounded


def _is_rounding(values: Array, wanted: Array) -> bool:
    """Both may have been rounded from float64, so `wanted`'s last bit may be off by one."""
    if wanted.dtype != np.float32 or values.shape != wanted.shape:
        return False
    low, high = (
        np.nextafter(wanted, np.float32(end)).astype(values.dtype) for end in (-np.inf, np.inf)
    )
    return bool(np.all((low <= values) & (values <= high)))


def _describe(values: Array) -> str:
    return f"{values.dtype} {list(values.shape)} {values.reshape(-1)[:3]}.."


def _stale_caches(inputs: Shapes) -> dict[str, Array]:
    """As an earlier request left them: values within +-2, exact in every 16-bit format."""
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(-128, 128, (len(_PROMPT_LENGTHS), *shape[1:]), np.int8) / np.float32(64)
        for name, shape in inputs.items()
        if name.startswith("past_")
    }


def _as_past(outputs: Mapping[str, Array]) -> dict[str, Array]:
    return {
        name.replace("present_", "past_"): value
        for name, value in outputs.items()
        if name != "logits"
    }


def _steps(context: int, vocab_size: int) -> Iterator[tuple[str, dict[str, Array]]]:
    rng = np.random.default_rng(1)
    lengths = np.array(_PROMPT_LENGTHS, np.int64)
    rows, longest = len(lengths), max(_PROMPT_LENGTHS)
    needed = longest + _DECODE_STEPS
    if context < needed:
        raise CheckError(f"the check needs a context of {needed} tokens, got {context}")
    columns = np.arange(longest)
    ends = context - np.arange(rows, dtype=np.int64)
    one_token = np.zeros((rows, 1), np.int64)

    def step(width: int, starts: Array, logits: Array) -> dict[str, Array]:
        ids = rng.integers(0, vocab_size, (rows, width))
        return {"input_ids": ids, "write_indices": starts, "logits_index": logits}

    # All real positions; where a row has ended, its last one again.
    real = np.minimum(columns, lengths[:, None] - 1)
    prefill = step(longest, np.zeros(rows, np.int64), real)
    prefill["input_ids"] = np.where(columns < lengths[:, None], prefill["input_ids"], 0)
    yield "prefill", prefill
    for number in range(_DECODE_STEPS):
        yield f"decode {number + 1}", step(1, lengths + number, one_token)
    yield "end of context", step(1, ends - 1, one_token)
    yield "chunk at end of context", step(longest, ends - longest, np.tile(columns, (rows, 1)))


@dataclass
class _Comparison:
    """One step; the first tensor beyond the tolerance ends the check."""

    step: str
    reference: ReferenceModel
    wanted: Mapping[str, Array]
    differences: Differences
    _seen: set[str] = field(default_factory=set)

    def observe(self, name: str, value: Array) -> Array:
        """Compare what a quantizer reads and gives, and go on with the reference's value."""
        if name not in self.reference.observed:
            return value
        quantized = name in self.reference.quantized
        self._compare("quantizer_inputs" if quantized else "quantized_values", name, value)
        self._seen.add(name)
        return self.wanted[name]

    def compare_outputs(self, got: Mapping[str, Array]) -> None:
        if missing := self.reference.observed - self._seen:
            raise CheckError(f"the network has no tensor {', '.join(sorted(missing))}")
        for name, value in got.items():
            self._compare("logits" if name == "logits" else "caches", name, value)

    def _compare(self, sort: str, name: str, got: Array) -> None:
        what, wanted = f"{name} ({self.step})", self.wanted[name]
        if got.shape != wanted.shape:
            raise CheckError(f"{what} is {got.shape}, the reference has {wanted.shape}")
        rms = np.sqrt(np.vdot(wanted, wanted) / wanted.size) or 1.0
        unequal = got != wanted  # Most of a cache is equal: it was not written.
        relative = np.abs(got[unequal] - wanted[unequal]) / (rms + np.abs(wanted[unequal]))
        largest = float(relative.max(initial=0))
        if not largest <= TOLERANCE:  # NaN fails too.
            raise CheckError(
                f"{what} differs between the parsed network and ONNX Runtime by up to "
                f"{largest:.3g} of its magnitude, {TOLERANCE:g} is allowed; see how the parser "
                "reads the nodes between it and the quantizers before it"
            )
        found = self.differences.setdefault(sort, {"values": 0, "max_relative": 0.0})
        found["values"] += unequal.size
        found["max_relative"] = max(found["max_relative"], largest)


class ReferenceModel:
    """The float32 graph; `observed` are quantizers' inputs and DequantizeLinear's outputs."""

    def __init__(self, path: Path) -> None:
        import onnx

        self._dir = path.parent
        self._model: onnx.ModelProto = onnx.load(path, load_external_data=False)
        self.initializers = {tensor.name: tensor for tensor in self._model.graph.initializer}
        nodes = self._model.graph.node
        quantizers = [node for node in nodes if node.op_type == "QuantizeLinear"]
        codes = {node.output[0] for node in quantizers}
        self.quantized = {node.input[0] for node in quantizers}
        self.observed = self.quantized | {
            node.output[0]
            for node in nodes
            if node.op_type == "DequantizeLinear" and node.input[0] in codes
        }

    def initializer(self, name: str) -> Array:
        import onnx

        found: Array = onnx.numpy_helper.to_array(self.initializers[name], str(self._dir))
        return found

    def start(
        self, replaced: Mapping[str, Array]
    ) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        """A function from inputs to outputs and observed tensors, some initializers replaced."""
        import onnx
        import onnxruntime

        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        graph = model.graph
        # As inputs they need no copy inside the graph, whose size protobuf limits to 2 GB.
        for name, values in replaced.items():
            graph.initializer.remove(self.initializers[name])
            kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
            graph.input.append(onnx.helper.make_tensor_value_info(name, kind, values.shape))
        observed = sorted(self.observed)
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
        names = [tensor.name for tensor in session.get_outputs()]

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            values = session.run(names, {**feeds, **replaced})
            return dict(zip(names, values, strict=True))

        return run
