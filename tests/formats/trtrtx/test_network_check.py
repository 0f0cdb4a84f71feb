"""The network check on a tiny real decoder: the good one passes, each planted fault is caught.

A fault is planted in the file that TensorRT-RTX parses; ONNX Runtime reads the float32 reference.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from pipeline.core.errors import ToolError
from pipeline.formats.trtrtx.compiler import CheckJob, run_child
from pipeline.formats.trtrtx.network import CheckError
from pipeline.formats.trtrtx.network_check import check_network
from tests.formats.trtrtx.network_check_graph import TinyDecoder, insert_after, node

Plant = Callable[[onnx.ModelProto], None]

ATTENTION = "model.layers.1.self_attn.attention"
QUERY_ROPE, KEY_ROPE = "model.layers.1.self_attn.q_rope", "model.layers.1.self_attn.k_rope"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> TinyDecoder:
    folder = tmp_path_factory.mktemp("decoder")
    return TinyDecoder(folder, keep_16bit={"model.layers.1.self_attn.o_proj"})


@pytest.fixture(scope="module")
def reference(decoder: TinyDecoder) -> Path:
    return decoder.save(decoder.model("float32"), "cpu")


def check(decoder: TinyDecoder, reference: Path, plant: Plant) -> dict[str, Any]:
    """Run the check with a fault in the RTX file only."""
    model = decoder.model("bfloat16")
    plant(model)
    return check_network(decoder.save(model, "rtx"), reference)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_good_network_agrees_with_the_reference_at_float32_accuracy(
    decoder: TinyDecoder, reference: Path, dtype: Literal["bfloat16", "float16"]
) -> None:
    rtx = decoder.save(decoder.model(dtype), dtype)
    result = check_network(rtx, reference)

    assert result["differences"]["logits"]["max_relative"] < 1e-5
    assert result["differences"]["caches"]["max_relative"] < 1e-5
    assert result["differences"]["quantized_values"]["max_relative"] == 0  # Not one code flipped.
    assert result["differences"]["quantized_values"]["values"] > 5_000
    assert result["constants_rounded"] == ["rope_cos", "rope_sin"]
    # 14 weights, 13 weight scales, 7 input scales, embedding, 5 norms: bfloat16 and FP8 too.
    assert result["constants_equal"] >= 40
    assert result["layer_kinds"]["ATTENTION_INPUT"] == 2
    assert result["differences"]["logits"]["values"] > 0


def nonpad_kv_seqlen(model: onnx.ModelProto) -> None:
    inputs = ["write_indices", "input_ids.shape"]
    model.graph.node.insert(0, helper.make_node("Add", inputs, ["valid_lengths"]))
    shape = node(model, "input_ids.shape")
    model.graph.node.remove(shape)
    model.graph.node.insert(0, shape)
    attention = node(model, ATTENTION)
    attention.input[3:] = ["", "", "", "valid_lengths"]
    attention.attribute.append(helper.make_attribute("is_causal", 1))


def mask_left_out(model: onnx.ModelProto) -> None:
    del node(model, ATTENTION).input[3]


def float_mask(model: onnx.ModelProto) -> None:
    insert_after(model, "attention_mask", "Cast", to=onnx.TensorProto.BFLOAT16)


def attention_taken_apart(model: onnx.ModelProto) -> None:
    attention = node(model, ATTENTION)
    model.graph.node.remove(attention)
    model.graph.node.append(helper.make_node("Identity", attention.input[:1], [ATTENTION]))
    sort_nodes(model)


def sort_nodes(model: onnx.ModelProto) -> None:
    """Move the last node to where its inputs are ready."""
    moved = model.graph.node[-1]
    made = {name for one in model.graph.node[:-1] for name in one.output}
    needed = set(moved.input) & made
    last = max(i for i, one in enumerate(model.graph.node[:-1]) if needed & set(one.output))
    copy = onnx.NodeProto()
    copy.CopyFrom(moved)
    del model.graph.node[-1]
    model.graph.node.insert(last + 1, copy)


def cache_input_dropped(model: onnx.ModelProto) -> None:
    node(model, "present_value.1").input[0] = "past_value.0"
    inputs = model.graph.input
    inputs.remove(next(tensor for tensor in inputs if tensor.name == "past_value.1"))


def cache_input_unread(model: onnx.ModelProto) -> None:
    node(model, "present_value.1").input[0] = "past_value.0"


def input_added(model: onnx.ModelProto) -> None:
    model.graph.input.append(
        helper.make_tensor_value_info("attention_bias", onnx.TensorProto.INT64, ["batch"])
    )


def output_renamed(model: onnx.ModelProto) -> None:
    node(model, "logits").output[0] = "scores"
    model.graph.output[0].name = "scores"


def scale(name: str, factor: float) -> Plant:
    def plant(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * factor, name))

    return plant


def scale_of_another_linear(model: onnx.ModelProto) -> None:
    for tail in ("q", "dq"):
        name = f"model.layers.1.mlp.down_proj.input.{tail}"
        node(model, name).input[1] = "model.layers.0.mlp.gate_proj.input_scale"


def norm_weight_changed(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "model.norm.weight")
    values = np.ones(tensor.dims, ml_dtypes.bfloat16)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def rope_of_another_theta(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "rope_cos")
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.roll(values, 1, axis=0), tensor.name))


def caches_swapped(model: onnx.ModelProto) -> None:
    node(model, "present_key.1").input[0] = "past_value.1"
    node(model, "present_value.1").input[0] = "past_key.1"


def rotary_interleaved(model: onnx.ModelProto) -> None:
    for name in (QUERY_ROPE, KEY_ROPE):
        attributes = node(model, name).attribute
        next(a for a in attributes if a.name == "interleaved").i = 1


def rotary_taken_apart(model: onnx.ModelProto) -> None:
    rope = node(model, KEY_ROPE)
    rope.op_type = "Identity"
    del rope.input[1:], rope.attribute[:]


def own_key_hidden(model: onnx.ModelProto) -> None:
    node(model, "attention_mask").op_type = "Less"


def attention_scale_changed(model: onnx.ModelProto) -> None:
    attributes = node(model, ATTENTION).attribute
    next(a for a in attributes if a.name == "scale").f = 0.36


def epsilon_changed(model: onnx.ModelProto) -> None:
    attributes = node(model, "model.norm").attribute
    next(a for a in attributes if a.name == "epsilon").f = 2e-3


def positions_start_at_zero(model: onnx.ModelProto) -> None:
    """A prefill into an empty cache is right; every later step is wrong."""
    nodes = list(model.graph.node)
    start = "write_indices.column"
    index = next(i for i, one in enumerate(nodes) if start in one.output)
    model.graph.node.insert(index + 1, helper.make_node("Sub", [start, start], ["nought"]))
    node(model, "position_ids").input[0] = "nought"


def quantizer_left_out(model: onnx.ModelProto) -> None:
    product = node(model, "model.layers.1.mlp.down_proj")
    product.input[0] = "model.layers.1.mlp.product"


def unknown_kind(model: onnx.ModelProto) -> None:
    insert_after(model, "model.layers.1.residual", "Softmax", axis=-1)


def unknown_operation(model: onnx.ModelProto) -> None:
    insert_after(model, "model.layers.1.residual", "Erf")


FAULTS: list[tuple[Plant, str]] = [
    # Caught by the guard.
    (rotary_taken_apart, "3 ROTARY_EMBEDDING layers, wanted 4"),
    (nonpad_kv_seqlen, "ATTENTION_INPUT layer .*no mask.*UPPER_LEFT.*nonpad_kv_seqlen"),
    (mask_left_out, f"ATTENTION_INPUT layer '{ATTENTION}.*no mask"),
    (float_mask, "mask of BF16, wanted BOOL"),
    (attention_taken_apart, "1 ATTENTION_INPUT layers, wanted 2"),
    (cache_input_dropped, "past_value.1 is missing"),
    (cache_input_unread, "no layer of the network reads the input past_value.1"),
    (input_added, "attention_bias is not part of the decoder"),
    (output_renamed, "logits is missing.*scores is not part"),
    # Caught by the constants.
    (scale("model.layers.1.mlp.down_proj.input_scale", 2.0), "down_proj.input_scale is"),
    (norm_weight_changed, "constant model.norm.weight is"),
    (rope_of_another_theta, "constant rope_cos is"),
    # Caught by the values, at the first tensor behind the fault.
    (scale_of_another_linear, r"layers.1.mlp.down_proj.input.dq \(prefill\) differs"),
    (caches_swapped, r"present_(key|value).1 \(prefill\) differs"),
    (own_key_hidden, "a mask that hides all keys from a query is unknown"),
    (attention_scale_changed, r"layers.1.post_attention_layernorm \(prefill\) differs"),
    (epsilon_changed, r"logits \(prefill\) differs"),
    (positions_start_at_zero, r"\(decode 1\) differs"),
    (quantizer_left_out, r"logits \(prefill\) differs"),
    # Fails closed.
    (rotary_interleaved, "ROTARY_EMBEDDING layer .*interleaved = True is unknown"),
    (unknown_kind, "the kind SOFTMAX is unknown to the network check"),
    (unknown_operation, "UNARY layer 'inserted': op = ERF is unknown"),
]


@pytest.mark.parametrize(("plant", "message"), FAULTS)
def test_planted_fault_is_caught_and_named(
    decoder: TinyDecoder, reference: Path, plant: Plant, message: str
) -> None:
    with pytest.raises(CheckError, match=f"(?s){message}"):
        check(decoder, reference, plant)


def run(decoder: TinyDecoder, rtx: Path, reference: Path) -> Path:
    out = decoder.dir / f"{rtx.stem}.out.json"
    job = CheckJob(graph=rtx, reference=reference, result=out)
    run_child(job, decoder.dir, stage="network-check", log_path=decoder.dir / "child.log")
    return out


def test_child_writes_its_result(decoder: TinyDecoder, reference: Path) -> None:
    out = run(decoder, decoder.save(decoder.model("bfloat16"), "good"), reference)
    assert json.loads(out.read_text())["differences"]["logits"]["max_relative"] < 1e-5


def test_child_fails_with_the_reason_and_no_result(decoder: TinyDecoder, reference: Path) -> None:
    model = decoder.model("bfloat16")
    mask_left_out(model)
    with pytest.raises(ToolError, match="has no mask") as caught:
        run(decoder, decoder.save(model, "bad"), reference)
    assert caught.value.returncode == 1
    assert not (decoder.dir / "bad.out.json").exists()
