"""Computes what a parsed TensorRT-RTX network says, with NumPy.

A reference in the plain sense: one function per kind of layer (`rules`), no fusion. It knows what
the decoder graph becomes, with every attribute that matters, and refuses all else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.formats.trtrtx.network_check.network import CheckError, Layer, layers_of
from pipeline.formats.trtrtx.network_check.rules import RULES, Array, representation, unknown

Observe = Callable[[str, Array], Array]
"""Gets the name and value of a tensor as it is computed; returns the value to go on with."""


@dataclass(frozen=True)
class Constant:
    """A constant of the network: TensorRT's name of its dtype, and its values as `rules` says."""

    dtype: str
    values: Array


class NetworkInterpreter:
    """A network whose layers are known and sorted; what depends on constants only is computed.

    Args:
        network: An `INetworkDefinition`; the object that owns its weights must stay alive during
            construction.

    Attributes:
        constants: The CONSTANT layers by name, which is that of the ONNX initializer where there is
            one.
        quantized: Names of the tensors that QUANTIZE layers read.

    Raises:
        CheckError: A layer kind or attribute that is not known.
    """

    def __init__(self, network: Any) -> None:
        layers = list(layers_of(network))
        for layer in layers:
            _check_known(layer)
        self._inputs = [network.get_input(i) for i in range(network.num_inputs)]
        self._outputs = [network.get_output(i).name for i in range(network.num_outputs)]
        constant, self._layers = _in_order(layers, {tensor.name for tensor in self._inputs})
        values: dict[str, Array] = {}
        self.constants: dict[str, Constant] = {}
        for layer in constant:
            tensor = layer.outputs[0]
            values[tensor.name] = _evaluate(layer, values)
            if layer.kind == "CONSTANT":
                self.constants[layer.name] = Constant(tensor.dtype.name, values[tensor.name])
        self.quantized = frozenset(
            _input_names(layer)[0] for layer in layers if layer.kind == "QUANTIZE"
        )
        read = {name for layer in self._layers for name in _input_names(layer)}
        self._fixed = {name: values[name] for name in read & values.keys()}

    def run(self, feeds: Mapping[str, Array], observe: Observe | None = None) -> dict[str, Array]:
        """Compute all outputs.

        Args:
            feeds: Value of each input, 16-bit ones as float32.
            observe: Called for each tensor that depends on an input.

        Returns:
            Value of each output, 16-bit ones as float32.

        Raises:
            CheckError: A value has another shape or dtype than the network states.
        """
        values = dict(self._fixed)
        for tensor in self._inputs:
            values[tensor.name] = feeds[tensor.name]
        for layer in self._layers:
            name = layer.outputs[0].name
            value = _evaluate(layer, values)
            values[name] = observe(name, value) if observe else value
        return {name: values[name] for name in self._outputs}


def _check_known(layer: Layer) -> None:
    """There is a rule for the kind, and it reads all attributes that the kind's class has."""
    import tensorrt_rtx as trt

    rule = RULES.get(layer.kind)
    if rule is None:
        raise unknown(layer, f"the kind {layer.kind}")
    offered = {name for name in dir(type(layer.layer)) if not name.startswith("_")}
    common = {name for name in dir(trt.ILayer) if not name.startswith("_")}
    if extra := offered - common - rule.attributes:
        raise unknown(layer, f"the attribute {', '.join(sorted(extra))}")
    if layer.layer.num_outputs != 1:
        raise unknown(layer, f"a form with {layer.layer.num_outputs} outputs")


def _input_names(layer: Layer) -> list[str]:
    return [tensor.name for tensor in layer.inputs if tensor is not None]


def _in_order(layers: list[Layer], inputs: set[str]) -> tuple[list[Layer], list[Layer]]:
    """Sort into an order of execution: layers on constants only, then those on inputs.

    Raises:
        CheckError: A tensor is made twice or never, or there is a cycle.
    """
    made_by = {layer.outputs[0].name: layer for layer in layers}
    if len(made_by) != len(layers) or made_by.keys() & inputs:
        raise CheckError(
            "the network has two tensors of one name; the check cannot tell them apart"
        )
    depends_on_input = dict.fromkeys(inputs, True)
    constant: list[Layer] = []
    varying: list[Layer] = []
    waiting = layers
    while waiting:
        blocked: list[Layer] = []
        for layer in waiting:
            names = _input_names(layer)
            if not all(name in depends_on_input for name in names):
                blocked.append(layer)
                continue
            varies = any(depends_on_input[name] for name in names)
            depends_on_input[layer.outputs[0].name] = varies
            (varying if varies else constant).append(layer)
        if len(blocked) == len(waiting):
            raise CheckError(f"{blocked[0]} waits for a tensor that no layer makes")
        waiting = blocked
    return constant, varying


def _evaluate(layer: Layer, values: Mapping[str, Array]) -> Array:
    """Compute a layer and hold the result against dtype and shape that the network states."""
    inputs = [None if tensor is None else values[tensor.name] for tensor in layer.inputs]
    value = RULES[layer.kind].evaluate(layer, inputs)
    tensor = layer.outputs[0]
    shape = tuple(int(size) for size in tensor.shape)
    fits = len(shape) == value.ndim and all(
        stated in (-1, size) for stated, size in zip(shape, value.shape, strict=False)
    )
    if not fits or value.dtype != representation(layer, tensor.dtype):
        raise CheckError(
            f"{layer} should give {tensor.dtype.name} {shape}, the network check computed "
            f"{value.dtype} {value.shape}: it does not understand this layer"
        )
    return value
