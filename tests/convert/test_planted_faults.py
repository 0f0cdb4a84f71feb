"""Faults planted in the converted graph are seen against Transformers; the good graph passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.convert.graph_writer import write_weights
from pipeline.convert.onnx_graph import build_decoder, save_graph
from pipeline.convert.unified import UnifiedCheckpoint
from pipeline.hf import load_model
from pipeline.runners.decode import generate_greedy
from pipeline.runners.onnxruntime import OnnxRuntimeGraph
from tests.tiny import VOCAB_SIZE, tiny_model

CONTEXT = 128
NEW_TOKENS = 64
PROMPTS = [
    np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).tolist()
    for seed, length in ((1, 9), (2, 23), (3, 40))
]
Mutation = Callable[[Any], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return load_model(folder, "float32")


def graph_of(folder: Path, out: Path, mutate: Mutation = lambda model: None) -> OnnxRuntimeGraph:
    checkpoint = UnifiedCheckpoint(folder)
    model = build_decoder(
        checkpoint,
        write_weights(checkpoint, out / "weights.bin"),
        context=CONTEXT,
        activation="float32",
    )
    mutate(model)
    save_graph(model, out / "graph.onnx")
    return OnnxRuntimeGraph(out / "graph.onnx", threads=1)


def two_step_difference(graph: OnnxRuntimeGraph, reference: Any) -> float:
    """Largest logit difference over a prefill and two decode steps of one prompt."""
    import torch

    tokens = PROMPTS[1]
    decoder = graph.bind(1)
    start = len(tokens) - 2
    every = np.arange(start)[None]
    steps = [decoder.step(np.array([tokens[:start]]), np.zeros(1, np.int64), every)[0].copy()]
    for position in (start, start + 1):
        step = decoder.step(
            np.array([[tokens[position]]]), np.array([position]), np.zeros((1, 1), np.int64)
        )
        steps.append(step[0].copy())
    with torch.inference_mode():
        wanted = reference(torch.tensor([tokens])).logits[0].numpy()
    return float(np.abs(np.concatenate(steps) - wanted).max())


def test_unquantized_graph_gives_the_logits_of_transformers(
    folder: Path, reference: Any, tmp_path: Path
) -> None:
    assert two_step_difference(graph_of(folder, tmp_path), reference) < 1e-3


def test_greedy_tokens_are_those_of_transformers_alone_and_ragged(
    folder: Path, reference: Any, tmp_path: Path
) -> None:
    import torch

    graph = graph_of(folder, tmp_path)
    ragged = generate_greedy(graph.bind(len(PROMPTS)), PROMPTS, NEW_TOKENS)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        wanted = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert generate_greedy(graph.bind(1), [prompt], NEW_TOKENS)[0].tolist() == wanted
        assert ragged[row].tolist() == wanted


def swap_gate_and_up(model: Any) -> None:
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    for node in model.graph.node:
        part = node.output[0].rsplit(".", 1)[-1]
        if node.op_type == "MatMul" and part in other:
            node.input[1] = node.input[1].replace(part, other[part])
    # The other matrix may be transposed only later in the list.
    transposes = [node for node in model.graph.node if node.op_type == "Transpose"]
    weights = [node for node in transposes if node.output[0].endswith(".weight.t")]
    for node in weights:
        copy = type(node)()
        copy.CopyFrom(node)
        model.graph.node.remove(node)
        model.graph.node.insert(0, copy)


def interleave_rope(model: Any) -> None:
    for node in model.graph.node:
        if node.op_type == "RotaryEmbedding":
            node.attribute[0].i = 1


def wrong_theta(model: Any) -> None:
    from onnx import numpy_helper

    from pipeline.convert.rope import rope_tables

    cos, sin = rope_tables(theta=10000.0, rotary_dim=16, context=CONTEXT)
    for tensor in model.graph.initializer:
        for name, table in (("rope_cos", cos), ("rope_sin", sin)):
            if tensor.name == name:
                tensor.CopyFrom(numpy_helper.from_array(table.astype(np.float32), name))


def cache_one_row_off(model: Any) -> None:
    from onnx import helper

    model.graph.node.insert(0, helper.make_node("Add", ["write_indices", "int_1"], ["shifted"]))
    for node in model.graph.node:
        if node.op_type == "TensorScatter":
            node.input[2] = "shifted"


def no_mask(model: Any) -> None:
    for node in model.graph.node:
        if node.op_type == "Attention":
            del node.input[3]


@pytest.mark.parametrize(
    "fault", [swap_gate_and_up, interleave_rope, wrong_theta, cache_one_row_off, no_mask]
)
def test_planted_fault_is_seen(
    fault: Mutation, folder: Path, reference: Any, tmp_path: Path
) -> None:
    assert two_step_difference(graph_of(folder, tmp_path, fault), reference) > 0.05
