"""Parts of the unquantized graph: chosen layers, chosen positions, 16-bit types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.formats.decoder.decoders import (
    graph_logits,
    open_graph,
    random_prompt,
    write_graph,
)


def test_logits_index_selects_the_positions_of_each_row(plain_dir: Path, tmp_path: Path) -> None:
    plain_graph = write_graph(plain_dir, tmp_path)
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
