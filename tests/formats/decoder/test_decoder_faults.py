"""Faults planted in the graph are seen by the comparison that the good graph passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.values import Checkpoint
from pipeline.model.rope import Rope, rope_tables
from pipeline.quant.simulate import load_simulation
from tests.formats.decoder.decoders import CONTEXT, differences, mutant, random_prompt, reference

PROMPT = random_prompt(24, seed=7)
DECODED = random_prompt(8, seed=8)
SEEN = 0.05
"""Logits; 50 times the tolerance that the good graph keeps."""


def swap_gate_and_up(graph: Any) -> None:
    nodes = {node.name: node for node in graph.node}
    gate, up = (nodes[f"model.layers.1.mlp.{part}_proj"] for part in ("gate", "up"))
    gate.input[1], up.input[1] = up.input[1], gate.input[1]


def interleave_rope(graph: Any) -> None:
    for node in graph.node:
        if node.op_type == "RotaryEmbedding":
            (attribute,) = (a for a in node.attribute if a.name == "interleaved")
            attribute.i = 1


def change_theta(graph: Any) -> None:
    import onnx

    tables = rope_tables(Rope(theta=10000.0, rotary_dim=16), context=CONTEXT)
    for name, table in zip(("rope_cos", "rope_sin"), tables, strict=True):
        (tensor,) = (t for t in graph.initializer if t.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(table.astype(np.float32), name))


def write_one_row_off(graph: Any) -> None:
    import onnx

    one = "int_1"  # a constant that the graph has
    add = onnx.helper.make_node("Add", ["write_indices", one], ["row_off"])
    graph.node.insert(0, add)
    for node in graph.node:
        if node.op_type == "TensorScatter":
            node.input[2] = "row_off"


def double_a_weight_scale(graph: Any) -> None:
    import onnx

    name = "model.layers.0.self_attn.o_proj.weight_scale"
    (tensor,) = (t for t in graph.initializer if t.name == name)
    doubled = onnx.numpy_helper.to_array(tensor) * np.float32(2)
    tensor.CopyFrom(onnx.numpy_helper.from_array(doubled, name))


def distances(graph: Path, model: Any) -> tuple[float, float]:
    return differences(graph, model, PROMPT, DECODED)


@pytest.fixture(scope="module")
def model(plain_dir: Path) -> Any:
    return reference(plain_dir)


def test_good_graph_passes_the_comparison(plain_graph: Path, model: Any) -> None:
    assert max(distances(plain_graph, model)) < 1e-3


@pytest.mark.parametrize(
    "change",
    [swap_gate_and_up, interleave_rope, change_theta, write_one_row_off],
    ids=lambda change: change.__name__,
)
def test_planted_fault_is_seen(
    plain_graph: Path, model: Any, change: Callable[[Any], None]
) -> None:
    faulty = mutant(plain_graph, change, change.__name__)
    at_prefill, at_decode = distances(faulty, model)
    assert at_prefill > SEEN
    assert at_decode > SEEN


def test_doubled_weight_scale_is_seen_against_the_simulation(
    fp8_graph: Path, fp8_checkpoint: Checkpoint
) -> None:
    simulation = load_simulation(fp8_checkpoint.dir)
    faulty = mutant(fp8_graph, double_a_weight_scale, "doubled")
    good, bad = distances(fp8_graph, simulation), distances(faulty, simulation)
    # A flipped FP8 code moves single logits of the good graph too; the fault moves them far more.
    assert min(bad) > 10 * max(max(good), 1e-3)
