"""A tiny FP8 decoder, written by the real graph builder, and faults to plant in its ONNX file."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx

from pipeline.formats.trtrtx.graph_writer import WEIGHTS_FILE, WeightSlot, write_weights
from pipeline.formats.trtrtx.onnx_graph import ActivationDtype, build_decoder
from pipeline.quant.unified import UnifiedCheckpoint
from tests.architectures import tiny_fp8_architecture

CONTEXT = 24


class TinyDecoder:
    """The graphs of a checkpoint of two layers with random weights.

    Args:
        folder: Gets the checkpoint.
        architecture: One of `tests.architectures`.
        context: Cache length, tokens.
        keep_16bit: Linears that stay bfloat16.
    """

    def __init__(
        self,
        folder: Path,
        architecture: str = "llama3.2",
        context: int = CONTEXT,
        keep_16bit: Collection[str] = (),
    ) -> None:
        self.dir = folder
        self._context = context
        tiny_fp8_architecture(architecture, folder, num_hidden_layers=2, keep_16bit=keep_16bit)
        self.checkpoint = UnifiedCheckpoint(folder)
        self._slots: dict[str, WeightSlot] = write_weights(self.checkpoint, folder / WEIGHTS_FILE)

    def model(self, activation: ActivationDtype) -> onnx.ModelProto:
        """The decoder graph, to be changed by a test."""
        return build_decoder(
            self.checkpoint, self._slots, context=self._context, activation=activation
        )

    def save(self, model: onnx.ModelProto, name: str) -> Path:
        path = self.dir / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        return path


def node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    """The node that makes `output`."""
    return next(node for node in model.graph.node if output in node.output)


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def attribute(one: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(attribute for attribute in one.attribute if attribute.name == name)


def insert_after(model: onnx.ModelProto, name: str, op: str, **attributes: Any) -> None:
    """Put a node with one input behind the tensor `name`; all that read it read the new node."""
    index = next(i for i, one in enumerate(model.graph.node) if name in one.output)
    for other in model.graph.node:
        for position, read in enumerate(other.input):
            if read == name:
                other.input[position] = "inserted"
    inserted = onnx.helper.make_node(op, [name], ["inserted"], name="inserted", **attributes)
    model.graph.node.insert(index + 1, inserted)
