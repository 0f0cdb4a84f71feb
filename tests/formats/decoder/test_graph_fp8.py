"""FP8: the graph rounds as the simulation does, linear by linear, for every architecture.

Layers are compared one at a time: behind an FP8 code that a last-bit difference flips, all later
layers differ, in wide models at most positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.values import Checkpoint
from pipeline.quant.fp8 import round_to_e4m3
from pipeline.quant.simulate import load_simulation
from pipeline.quant.unified import UnifiedCheckpoint
from tests.architectures import ARCHITECTURES, ORIGINAL_CONTEXT, tiny_fp8_architecture
from tests.formats.decoder.decoders import (
    CONTEXT,
    graph_logits,
    model_logits,
    random_prompt,
    write_graph,
)
from tests.quant.tiny_quantized import architecture_checkpoint, tiny_checkpoint


def e4m3_values() -> Any:
    """All finite E4M3 values, ascending [253 with one zero]."""
    import torch

    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return torch.unique(values[values.isfinite()])


def awkward_inputs(scale: float) -> Any:
    """Codes, midpoints and their neighbours, subnormals, saturating and random values."""
    import torch

    codes = e4m3_values()
    midpoints = (codes[1:] + codes[:-1]) / 2
    exact = torch.cat([codes, midpoints, torch.tensor([464.0, 448.0 + 1e-4, 1e-12, -1e-12])])
    scaled = exact * scale
    up, down = (torch.nextafter(scaled, torch.tensor(sign * torch.inf)) for sign in (1, -1))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(10_000, generator=generator) * 100 * scale
    small = torch.randn(2_000, generator=generator) * 2.0**-7 * scale  # E4M3 subnormals
    return torch.cat([scaled, up, down, noise, small, torch.tensor([1e5, -1e5, 0.0, -0.0])])


@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 0.0123456789, 3.7e-5, 17.3])
def test_onnxruntime_rounds_as_round_to_e4m3_does(scale: float) -> None:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
            helper.make_node("Cast", ["codes"], ["code_values"], to=TensorProto.FLOAT),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
        ],
        "round",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"])
            for name in ("code_values", "y")
        ],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
            helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = awkward_inputs(scale)
    assert len(x) >= 10_000
    codes, rounded = session.run(None, {"x": x.numpy()})
    assert set(np.unique(codes)) <= set(e4m3_values().tolist())
    assert np.abs(codes).max() == 448.0  # saturates: no NaN
    np.testing.assert_array_equal(rounded, round_to_e4m3(x, scale).numpy())
    # The codes themselves, not only their products with the scale.
    np.testing.assert_array_equal(codes * np.float32(scale), round_to_e4m3(x, scale).numpy())


@pytest.fixture(scope="module")
def fp8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny model as ModelOpt quantizes it, layer 2's down_proj kept."""
    return tiny_checkpoint(tmp_path_factory.mktemp("fp8"), "model.layers.2.mlp.down_proj")


@pytest.fixture(scope="module")
def fp8_graph(fp8_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP8 checkpoint's float32 graph."""
    return write_graph(fp8_checkpoint.dir, tmp_path_factory.mktemp("fp8-graph"))


def with_outputs(graph: Path, names: list[str], name: str) -> Path:
    """The graph with inner values as further outputs, beside it."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    for value in names:
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None)
        )
    path = graph.with_name(f"{name}.onnx")
    path.write_bytes(model.SerializeToString())
    return path


def test_every_fp8_linear_has_the_checkpoints_weight_and_the_simulations_codes(
    fp8_graph: Path, fp8_checkpoint: Checkpoint
) -> None:
    import onnx
    import onnxruntime
    import torch
    from safetensors.torch import load_file

    (shard,) = fp8_checkpoint.dir.glob("*.safetensors")
    tensors = load_file(shard)
    linears = UnifiedCheckpoint(fp8_checkpoint.dir).quantized_linears
    assert set(linears) == set(fp8_checkpoint.quantized_linears)
    assert len(linears) == 3 * 7 - 1
    nodes = {
        node.output[0]: node for node in onnx.load(fp8_graph, load_external_data=False).graph.node
    }
    quantized = {module: nodes[module].input[0] for module in linears}  # ends in .dq
    sources = {  # what is rounded, two nodes before the product
        module: nodes[nodes[dequantized].input[0]].input[0]
        for module, dequantized in quantized.items()
    }
    wanted = [
        *linears,
        *(f"{module}.weight.dq" for module in linears),
        *sorted({*quantized.values(), *sources.values()}),
    ]
    session = onnxruntime.InferenceSession(
        str(with_outputs(fp8_graph, wanted, "inner")), providers=["CPUExecutionProvider"]
    )
    feed: dict[str, Any] = {
        "input_ids": np.array([random_prompt(40)], np.int64),
        "write_indices": np.zeros(1, np.int64),
        "logits_index": np.zeros((1, 1), np.int64),
    }
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            feed[value.name] = np.zeros((1, 2, CONTEXT, 16), np.float32)
    found = dict(zip(wanted, session.run(wanted, feed), strict=True))
    for module in linears:
        weight = tensors[f"{module}.weight"].float() * tensors[f"{module}.weight_scale"].float()
        np.testing.assert_array_equal(found[f"{module}.weight.dq"], weight.numpy(), err_msg=module)
        scale = float(tensors[f"{module}.input_scale"])
        rounded = round_to_e4m3(torch.from_numpy(found[sources[module]]), scale)
        np.testing.assert_array_equal(found[quantized[module]], rounded.numpy(), err_msg=module)
        product = torch.nn.functional.linear(rounded, weight).numpy()
        np.testing.assert_allclose(found[module], product, rtol=1e-5, atol=1e-5, err_msg=module)


def test_linears_with_one_input_and_one_scale_share_its_rounding(fp8_graph: Path) -> None:
    import onnx

    nodes = onnx.load(fp8_graph, load_external_data=False).graph.node
    # qkv, o, gate and up, down; one down_proj is kept in 16 bits.
    assert sum(node.op_type == "QuantizeLinear" for node in nodes) == 3 * 4 - 1


PROMPT = random_prompt(100)  # beyond every window and every original context


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """The tiny model as ModelOpt quantizes it."""
    return architecture_checkpoint(tmp_path_factory.mktemp("fp8"), request.param)


def median_distance(checkpoint_dir: Path, graph_dir: Path, layers: tuple[int, ...]) -> float:
    """Median over positions of the largest logit difference."""
    graph = write_graph(checkpoint_dir, graph_dir, context=CONTEXT, layers=layers)
    simulation = load_simulation(checkpoint_dir, layers=layers, context=CONTEXT)
    wanted = model_logits(simulation, PROMPT)
    assert np.ptp(wanted) > 1.0
    return float(np.median(np.abs(graph_logits(graph, PROMPT) - wanted).max(axis=-1)))


def test_every_layer_agrees_with_the_simulation(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = UnifiedCheckpoint(checkpoint.dir).spec
    per_layer = len(config.layers[0].modules)
    assert len(checkpoint.quantized_linears) == per_layer * config.num_layers
    for layer in range(config.num_layers):
        assert median_distance(checkpoint.dir, tmp_path / str(layer), (layer,)) < 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_foreign_checkpoint_whose_scales_differ_agrees_with_the_simulation(
    name: str, tmp_path: Path
) -> None:
    """As plain ModelOpt writes it; one linear is kept in 16 bits, fused ones included."""
    fused = name.startswith("phi")
    kept = "model.layers.1.mlp." + ("gate_up_proj" if fused else "up_proj")
    folder = tiny_fp8_architecture(name, tmp_path / "model", keep_16bit={kept})
    assert kept not in UnifiedCheckpoint(folder).quantized_linears
    for layer in (0, 1):
        assert median_distance(folder, tmp_path / str(layer), (layer,)) < 1e-3


def test_simulation_of_a_context_keeps_its_longrope_factors(tmp_path: Path) -> None:
    """Transformers chooses by the row; an engine of that context does not."""
    longrope_dir = tiny_fp8_architecture("phi3-long", tmp_path / "longrope")
    short_row = random_prompt(20)
    free = model_logits(load_simulation(longrope_dir), short_row)
    within = model_logits(load_simulation(longrope_dir, context=ORIGINAL_CONTEXT), short_row)
    beyond = model_logits(load_simulation(longrope_dir, context=ORIGINAL_CONTEXT + 1), short_row)
    np.testing.assert_array_equal(within, free)
    assert np.abs(beyond - free).max() > 0.05
