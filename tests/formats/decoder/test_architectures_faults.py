"""Faults that an architecture's own features invite are seen against Transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.model.spec import LongRopeScaling, Rope, rope_tables
from pipeline.quant.unified import UnifiedCheckpoint
from tests.architectures import tiny_architecture
from tests.formats.decoder.decoders import (
    differences,
    mutant,
    random_prompt,
    reference,
    write_graph,
)

CONTEXT = 128
PROMPT = random_prompt(80, seed=7)  # beyond every window and every original context
DECODED = random_prompt(8, seed=8)
SEEN = 0.02
"""Logits; 20 times the tolerance that the good graph keeps."""
Change = Callable[[Any, Rope], None]


def initializer(graph: Any, name: str) -> Any:
    (tensor,) = (t for t in graph.initializer if t.name == name)
    return tensor


def replace(graph: Any, name: str, values: Any) -> None:
    import onnx

    initializer(graph, name).CopyFrom(onnx.numpy_helper.from_array(values, name))


def replace_tables(graph: Any, rope: Rope) -> None:
    tables = rope_tables(rope, context=CONTEXT)
    for name, table in zip(("rope_cos", "rope_sin"), tables, strict=True):
        replace(graph, name, table[:CONTEXT].astype(np.float32))


def pass_by(graph: Any, output: str) -> None:
    """All that read `output` read the first input of the node that makes it."""
    (made,) = (node for node in graph.node if output in node.output)
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == output:
                node.input[index] = made.input[0]


def bias_dropped(graph: Any, rope: Rope) -> None:
    pass_by(graph, "model.layers.1.self_attn.k_proj.biased")


def key_rows_off_by_one_head(graph: Any, rope: Rope) -> None:
    key = initializer(graph, "model.layers.1.self_attn.qkv_proj.k.weight")
    (offset,) = (entry for entry in key.external_data if entry.key == "offset")
    row_bytes = key.dims[1] * 2
    offset.value = str(int(offset.value) - 32 * row_bytes)


def window_one_too_long(graph: Any, rope: Rope) -> None:
    import onnx

    window = onnx.numpy_helper.to_array(initializer(graph, "sliding_window"))
    replace(graph, "sliding_window", window + 1)


def window_counted_from_the_cache_start(graph: Any, rope: Rope) -> None:
    (near,) = (node for node in graph.node if node.name == "window_mask")
    near.op_type = "Less"


def too_few_elements_turned(graph: Any, rope: Rope) -> None:
    assert isinstance(rope.scaling, LongRopeScaling)
    for node in graph.node:
        if node.op_type == "RotaryEmbedding":
            next(a for a in node.attribute if a.name == "rotary_embedding_dim").i = 16
    cos, sin = rope_tables(rope, context=CONTEXT)
    replace(graph, "rope_cos", cos[:, :8].astype(np.float32))
    replace(graph, "rope_sin", sin[:, :8].astype(np.float32))


def attention_factor_left_out(graph: Any, rope: Rope) -> None:
    import onnx

    assert isinstance(rope.scaling, LongRopeScaling)
    for name in ("rope_cos", "rope_sin"):
        table = onnx.numpy_helper.to_array(initializer(graph, name))
        replace(graph, name, table / np.float32(rope.scaling.attention_factor))


def short_factors_beyond_the_original_context(graph: Any, rope: Rope) -> None:
    assert isinstance(rope.scaling, LongRopeScaling)
    short = dataclasses.replace(rope.scaling, long_factors=rope.scaling.short_factors)
    replace_tables(graph, dataclasses.replace(rope, scaling=short))


def llama3_scaling_left_out(graph: Any, rope: Rope) -> None:
    replace_tables(graph, dataclasses.replace(rope, scaling=None))


def keys_written_one_row_off(graph: Any, rope: Rope) -> None:
    import onnx

    add = onnx.helper.make_node("Add", ["write_indices", "int_1"], ["row_off"])
    graph.node.insert(0, add)
    for node in graph.node:
        if node.op_type == "TensorScatter":
            node.input[2] = "row_off"


def rest_of_the_attention_scale_left_out(graph: Any, rope: Rope) -> None:
    pass_by(graph, "model.layers.1.self_attn.q_scaled")


FAULTS: list[tuple[str, Change]] = [
    ("qwen2.5", bias_dropped),
    ("phi4-mini", key_rows_off_by_one_head),
    ("phi3", rest_of_the_attention_scale_left_out),
    ("mistral-sliding", window_one_too_long),
    ("mistral-sliding", window_counted_from_the_cache_start),
    ("phi4-mini", too_few_elements_turned),
    ("phi4-mini", attention_factor_left_out),
    ("phi3-long", short_factors_beyond_the_original_context),
    ("llama3.1", llama3_scaling_left_out),
    ("llama", keys_written_one_row_off),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


def good(root: Path, name: str) -> tuple[Path, Any, Rope]:
    """Graph, reference and rope settings of a model, written once."""
    model_dir = root / name / "model"
    graph = root / name / "graph" / "cpu.onnx"
    if not graph.is_file():
        tiny_architecture(name, model_dir)
        write_graph(model_dir, graph.parent, context=CONTEXT)
    return graph, reference(model_dir), UnifiedCheckpoint(model_dir).spec.rope


@pytest.mark.parametrize("name", sorted({name for name, _ in FAULTS}))
def test_good_graph_passes_the_comparison(root: Path, name: str) -> None:
    graph, model, _ = good(root, name)
    assert max(differences(graph, model, PROMPT, DECODED)) < 1e-3


@pytest.mark.parametrize(
    ("name", "change"), FAULTS, ids=[f"{name}-{change.__name__}" for name, change in FAULTS]
)
def test_planted_fault_is_seen(root: Path, name: str, change: Change) -> None:
    graph, model, rope = good(root, name)
    faulty = mutant(graph, lambda changed: change(changed, rope), change.__name__)
    at_prefill, at_decode = differences(faulty, model, PROMPT, DECODED)
    assert at_prefill > SEEN
    assert at_decode > SEEN
