"""The unquantized graph computes what Transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.formats.decoder.decoders import (
    generate_greedy,
    graph_logits,
    model_greedy,
    model_logits,
    open_graph,
    random_prompt,
    reference,
    write_graph,
)
from tests.tiny import tiny_model

NEW_TOKENS = 64
PROMPTS = [random_prompt(length, seed=length) for length in (3, 17, 40)]
SHAPES: dict[str, dict[str, Any]] = {
    "grouped-tied": {},
    "head_dim-not-hidden-over-heads": {"head_dim": 24},
    "untied-lm_head": {"tie_word_embeddings": False},
    "as-many-kv-heads-as-heads": {"num_key_value_heads": 4},
    "one-layer-one-kv-head": {"num_hidden_layers": 1, "num_key_value_heads": 1},
    "large-epsilon": {"rms_norm_eps": 0.1},
}


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """A graph and the Transformers model of the same weights."""
    folder = tmp_path_factory.mktemp("shape")
    model_dir = tiny_model(folder / "model", **SHAPES[request.param])
    return write_graph(model_dir, folder / "graph"), reference(model_dir)


def test_logits_are_within_a_thousandth_of_transformers(pair: tuple[Path, Any]) -> None:
    graph, model = pair
    for prompt in PROMPTS:
        wanted = model_logits(model, prompt)
        assert np.ptp(wanted) > 1.0  # a flat answer would agree with anything
        np.testing.assert_allclose(graph_logits(graph, prompt), wanted, rtol=0, atol=1e-3)


def test_greedy_tokens_equal_transformers_alone_and_in_a_ragged_batch(
    pair: tuple[Path, Any],
) -> None:
    graph, model = pair
    wanted = [model_greedy(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert len({tuple(row) for row in wanted}) == len(PROMPTS)
    loaded = open_graph(graph)
    alone = [generate_greedy(loaded.bind(1), [prompt], NEW_TOKENS)[0] for prompt in PROMPTS]
    assert [row.tolist() for row in alone] == wanted
    batch = generate_greedy(loaded.bind(len(PROMPTS)), PROMPTS, NEW_TOKENS)
    assert batch.tolist() == wanted


def test_chosen_layers_compute_what_a_model_of_these_layers_computes(
    plain_dir: Path, tmp_path: Path
) -> None:
    graph = write_graph(plain_dir, tmp_path, layers=(2, 0))
    model = reference(plain_dir)
    layers = model.model.layers
    model.model.layers = type(layers)([layers[2], layers[0]])
    for slot, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = slot
    model.config.num_hidden_layers = 2
    prompt = PROMPTS[1]
    wanted = model_logits(model, prompt)
    np.testing.assert_allclose(graph_logits(graph, prompt), wanted, rtol=0, atol=1e-3)
    assert len(open_graph(graph).cache_names) == 4


def test_logits_index_selects_the_positions_of_each_row(plain_graph: Path) -> None:
    prompts = [random_prompt(9, seed=1), random_prompt(9, seed=2)]
    wanted = [graph_logits(plain_graph, prompt) for prompt in prompts]
    picked = np.array([[8, 0, 3], [5, 5, 1]], np.int64)
    decoder = open_graph(plain_graph).bind(2)
    logits = decoder.step(np.array(prompts, np.int64), np.zeros(2, np.int64), picked)
    for row in range(2):
        np.testing.assert_allclose(logits[row], wanted[row][picked[row]], rtol=0, atol=1e-4)


@pytest.mark.parametrize("activation", ["bfloat16", "float16"])
def test_sixteen_bit_graphs_are_valid_onnx_of_that_dtype(
    plain_dir: Path, tmp_path: Path, activation: Any
) -> None:
    import onnx

    from pipeline.formats.trtrtx.graph_writer import write_weights
    from pipeline.formats.trtrtx.onnx_graph import build_decoder, save_graph
    from pipeline.quant.unified import UnifiedCheckpoint

    checkpoint = UnifiedCheckpoint(plain_dir)
    slots = write_weights(checkpoint, tmp_path / "weights.bin")
    save_graph(
        build_decoder(checkpoint, slots, context=32, activation=activation), tmp_path / "g.onnx"
    )
    onnx.checker.check_model(str(tmp_path / "g.onnx"), full_check=True)
    graph = onnx.load(tmp_path / "g.onnx", load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.output}
    assert types.pop("logits") == onnx.TensorProto.FLOAT
    assert set(types.values()) == {getattr(onnx.TensorProto, activation.upper())}
    modules = {node.name for node in graph.node}
    assert {
        f"model.layers.{layer}.{part}"
        for layer in range(3)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    } <= modules
