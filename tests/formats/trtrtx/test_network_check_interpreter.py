"""The interpreter's own rules: rounding like ONNX Runtime, reading weights, failing closed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorrt_rtx as trt
from onnx import TensorProto, helper, numpy_helper

from pipeline.formats.trtrtx import network as weights
from pipeline.formats.trtrtx.interpreter import NetworkInterpreter
from pipeline.formats.trtrtx.network import CheckError, constant_values, parse_network
from pipeline.quant.unified import UnifiedCheckpoint
from tests.formats.trtrtx.network_check_graph import TinyDecoder

SCALE = np.float32(0.013)


def write_model(path: Path, nodes: list[onnx.NodeProto], **constants: np.ndarray[Any, Any]) -> Path:
    """A graph from float32 `x` [n] to float32 `y` [n]."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "small",
        [info("x", TensorProto.FLOAT, ["n"])],
        [info("y", TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    opset = [helper.make_opsetid("", 24)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=11), path)
    return path


def test_quantizer_rounds_saturates_and_scales_as_onnxruntime_does(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "qdq.onnx",
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
        ],
        scale=np.array(SCALE),
        zero=np.zeros((), ml_dtypes.float8_e4m3fn),
    )
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = np.sort(codes[np.isfinite(codes)])
    middles = (codes[1:] + codes[:-1]) / 2
    noise = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    extremes = np.array([0, 440, 448, 449, 464, 1e5, -1e5, 1e-9, np.inf, -np.inf], np.float32)
    x = np.concatenate([codes * SCALE, middles * SCALE, extremes * SCALE, noise]).astype(np.float32)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (wanted,) = session.run(["y"], {"x": x})
    got = NetworkInterpreter(parse_network(path).network).run({"x": x})["y"]

    np.testing.assert_array_equal(got, wanted)
    assert got.max() == np.float32(448) * SCALE


def test_constants_of_every_dtype_are_read_bit_for_bit(tmp_path: Path) -> None:
    decoder = TinyDecoder(tmp_path)
    parsed = parse_network(decoder.save(decoder.model("float16"), "rtx"))
    constants = NetworkInterpreter(parsed.network).constants
    checkpoint = UnifiedCheckpoint(tmp_path)

    dtypes = set()
    for name in checkpoint.tensors:
        if name not in constants:  # Linears that share a quantizer have one scale in the graph.
            assert name.endswith(
                ("k_proj.input_scale", "v_proj.input_scale", "up_proj.input_scale")
            )
            continue
        wanted = checkpoint.read(name)
        got = constant_values(constants[name])
        dtypes.add(got.dtype.name)
        assert (got.dtype, got.tobytes()) == (wanted.dtype, wanted.tobytes()), name
    assert dtypes == {"bfloat16", "float8_e4m3fn", "float32"}


@pytest.mark.parametrize("wrong", ["type", "count", "values"])
def test_weights_in_an_unexpected_layout_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    real = weights._struct_of

    def struct_of(*arguments: Any) -> Any:
        found = real(*arguments)
        copy = type(found)(found.type, found.values, found.count)
        setattr(copy, wrong, {"type": 0, "count": 3, "values": None}[wrong])
        return copy

    monkeypatch.setattr(weights, "_struct_of", struct_of)
    decoder = TinyDecoder(tmp_path)
    parsed = parse_network(decoder.save(decoder.model("bfloat16"), "rtx"))
    with pytest.raises(CheckError, match="lays out weights in another way"):
        NetworkInterpreter(parsed.network)


def test_layer_class_with_an_attribute_that_no_rule_reads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "sqrt.onnx", [helper.make_node("Sqrt", ["x"], ["y"])])
    x = np.array([4.0, 9.0], np.float32)
    found = NetworkInterpreter(parse_network(path).network).run({"x": x})
    np.testing.assert_array_equal(found["y"], [2, 3])

    monkeypatch.setattr(trt.IUnaryLayer, "approximation", 1, raising=False)
    with pytest.raises(CheckError, match="attribute approximation is unknown"):
        NetworkInterpreter(parse_network(path).network)


def with_trt(build: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """A network written through TensorRT's own API, on a float32 input x [2, 3]."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float32, (2, 3))
    network.mark_output(build(network, x).get_output(0))
    return builder, network


def test_attribute_value_without_a_rule_is_refused() -> None:
    def gather(network: Any, x: Any) -> Any:
        other = network.add_input("other", trt.int32, (2, 1))
        return network.add_gather_v2(x, other, trt.GatherMode.ELEMENT)

    feeds = {"x": np.zeros((2, 3), np.float32), "other": np.zeros(3, np.float32)}
    with pytest.raises(CheckError, match="mode = ELEMENT is unknown"):
        NetworkInterpreter(with_trt(gather)[1]).run(feeds)


def test_shuffle_takes_zero_as_placeholder_only_where_the_layer_says_so() -> None:
    def reshape(network: Any, x: Any) -> Any:
        layer = network.add_shuffle(x)
        layer.first_transpose = trt.Permutation([1, 0])
        layer.reshape_dims = (0, 2, -1)
        layer.second_transpose = trt.Permutation([2, 0, 1])
        return layer

    builder, network = with_trt(reshape)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    (found,) = NetworkInterpreter(network).run({"x": x}).values()
    np.testing.assert_array_equal(found, x.T.reshape(3, 2, 1).transpose(2, 0, 1))
    del builder
