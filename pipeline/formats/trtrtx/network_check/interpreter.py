"""Computes what a parsed TensorRT-RTX network says, with NumPy.

A reference in the plain sense: one function per kind of layer (`rules`), no fusion. It knows what
the decoder graph becomes, with every attribute that matters, and refuses all else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from graphlib import TopologicalSorter
from typing import Any

from pipeline.formats.trtrtx.network_check.network import CheckError, Layer, layers_of
from pipeline.formats.trtrtx.network_check.rules import RULES, Array, representation, unknown

Observe = Callable[[str, Array], Array]
"""Gets the name and value of a tensor as it is computed; returns the value to go on with."""


class NetworkInterpreter:
    """A network whose layers are known and sorted; what depends on constants only is computed.

    Args:
        network: An `INetworkDefinition`; the object that owns its weights must stay alive during
            construction, and while constants are read.

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
        self._inputs = [network.get_input(i).name for i in range(network.num_inputs)]
        self._outputs = [network.get_output(i).name for i in range(network.num_outputs)]
        self.constants = {layer.name: layer for layer in layers if layer.kind == "CONSTANT"}
        self.quantized = {layer.inputs[0].name for layer in layers if layer.kind == "QUANTIZE"}
        values: dict[str, Array] = {}
        self._layers = []
        varying = set(self._inputs)
        for layer in _in_order(layers, varying):
            if varying.isdisjoint(tensor.name for tensor in layer.inputs):
                values[layer.outputs[0].name] = _evaluate(layer, values)
            else:
                varying.add(layer.outputs[0].name)
                self._layers.append(layer)
        read = {tensor.name for layer in self._layers for tensor in layer.inputs}
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
        values = {**self._fixed, **{name: feeds[name] for name in self._inputs}}
        for layer in self._layers:
            name = layer.outputs[0].name
            value = _evaluate(layer, values)
            values[name] = observe(name, value) if observe else value
        return {name: values[name] for name in self._outputs}


def _check_known(layer: Layer) -> None:
    """There is a rule for the kind, and it reads all attributes that the kind's class has."""
    import tensorrt_rtx as trt

    if layer.kind not in RULES:
        raise unknown(layer, f"the kind {layer.kind}")
    _, attributes = RULES[layer.kind]
    offered = {name for name in dir(type(layer.layer)) if not name.startswith("_")}
    if extra := offered - set(dir(trt.ILayer)) - attributes:
        raise unknown(layer, f"the attribute {', '.join(sorted(extra))}")
    if len(layer.outputs) != 1 or None in layer.inputs:
        raise unknown(layer, f"a form with {len(layer.outputs)} outputs or an absent input")


def _in_order(layers: list[Layer], inputs: set[str]) -> list[Layer]:
    """Sort into an order of execution.

    Raises:
        CheckError: A tensor is made twice or never.
    """
    made_by = {layer.outputs[0].name: layer for layer in layers}
    reads = {name: {tensor.name for tensor in made_by[name].inputs} for name in made_by}
    if len(made_by) != len(layers) or made_by.keys() & inputs:
        raise CheckError(
            "the network has two tensors of one name; the check cannot tell them apart"
        )
    if lost := set().union(*reads.values()) - made_by.keys() - inputs:
        raise CheckError(f"no layer of the network makes the tensor {', '.join(sorted(lost))}")
    order = TopologicalSorter(reads).static_order()
    return [made_by[name] for name in order if name in made_by]


def _evaluate(layer: Layer, values: Mapping[str, Array]) -> Array:
    """Compute a layer and hold the result against dtype and shape that the network states."""
    try:
        inputs = [values[tensor.name] for tensor in layer.inputs]
        evaluate, _ = RULES[layer.kind]
        value = evaluate(layer, *inputs)
    except (IndexError, TypeError, ValueError) as error:
        raise unknown(layer, f"a form that NumPy refuses ({error})") from error
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
