"""The network check on tiny real decoders: the good one passes, each planted fault is caught.

A fault is planted in the file that TensorRT-RTX parses; ONNX Runtime reads the float32 reference.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from pipeline.core.errors import ToolError
from pipeline.formats.trtrtx.compiler import run_child
from pipeline.formats.trtrtx.network import CheckError
from pipeline.formats.trtrtx.network_check import check_network
from pipeline.formats.trtrtx.onnx_graph import ActivationDtype
from tests.architectures import ARCHITECTURES, WINDOW
from tests.formats.trtrtx.network_check_graph import (
    TinyDecoder,
    attribute,
    initializer,
    insert_after,
    node,
)

Plant = Callable[[onnx.ModelProto], None]

ATTENTION = "model.layers.1.self_attn.attention"
QUERY_ROPE, KEY_ROPE = "model.layers.1.self_attn.q_rope", "model.layers.1.self_attn.k_rope"
LLAMA = "llama3.2"
KEPT = {"model.layers.1.self_attn.o_proj"}
CONTEXT = 48
"""Beyond the window, so that it hides keys at the end of the context."""
assert WINDOW < CONTEXT


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


def decoder(root: Path, name: str = LLAMA) -> TinyDecoder:
    folder = root / name
    made = TinyDecoder(folder, name, CONTEXT, keep_16bit=KEPT if name == LLAMA else ())
    if not (folder / "cpu.onnx").is_file():
        made.save(made.model("float32"), "cpu")
    return made


def check(
    made: TinyDecoder, plant: Plant | None = None, dtype: ActivationDtype = "bfloat16"
) -> dict[str, Any]:
    """Run the check with a fault in the RTX file only."""
    model = made.model(dtype)
    if plant is not None:
        plant(model)
    return check_network(made.save(model, "rtx"), made.dir / "cpu.onnx")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "bfloat16") for name in ARCHITECTURES), (LLAMA, "float16"), ("qwen2.5", "float16")],
)
def test_good_network_agrees_with_the_reference_at_float32_accuracy(
    root: Path, name: str, dtype: ActivationDtype
) -> None:
    result = check(decoder(root, name), dtype=dtype)
    found = result["differences"]
    assert 0 <= found["logits"]["max_relative"] < 1e-5
    assert found["caches"]["max_relative"] < 1e-5
    assert found["quantized_values"]["max_relative"] == 0  # Not one code flipped.
    assert found["quantized_values"]["values"] > 5_000
    ends = ("", ".1") if name == "gemma3" else ("",)
    rounded = {f"rope_{table}{end}" for table in ("cos", "sin") for end in ends}
    further = {"gemma3": {"embedding_scale"}, "ministral3": {"query_gains"}}
    assert set(result["constants_rounded"]) == rounded | further.get(name, set())
    assert result["layer_kinds"]["ROTARY_EMBEDDING"] == 4
    # All weights are compared: seven linears, Qwen2's three biases, Qwen3's two norms; the others.
    more = 3 * name.startswith("qwen2") + 2 * name.startswith("qwen3")
    assert result["constants_equal"] > 2 * (7 + 2 + more) + 2


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
        tensor = initializer(model, name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * factor, name))

    return plant


def scale_of_another_linear(model: onnx.ModelProto) -> None:
    for tail in ("q", "dq"):
        name = f"model.layers.1.mlp.down_proj.input.{tail}"
        node(model, name).input[1] = "model.layers.0.mlp.gate_proj.input_scale"


def rope_of_another_theta(model: onnx.ModelProto) -> None:
    tensor = initializer(model, "rope_cos")
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.roll(values, 1, axis=0), tensor.name))


def caches_swapped(model: onnx.ModelProto) -> None:
    node(model, "present_key.1").input[0] = "past_value.1"
    node(model, "present_value.1").input[0] = "past_key.1"


def rotary_interleaved(model: onnx.ModelProto) -> None:
    for name in (QUERY_ROPE, KEY_ROPE):
        attribute(node(model, name), "interleaved").i = 1


def rotary_taken_apart(model: onnx.ModelProto) -> None:
    rope = node(model, KEY_ROPE)
    rope.op_type = "Identity"
    del rope.input[1:], rope.attribute[:]


def own_key_hidden(model: onnx.ModelProto) -> None:
    node(model, "attention_mask").op_type = "Less"


def attention_scale_changed(model: onnx.ModelProto) -> None:
    attribute(node(model, ATTENTION), "scale").f = 0.36


def epsilon_changed(model: onnx.ModelProto) -> None:
    attribute(node(model, "model.norm"), "epsilon").f = 2e-3


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


def rename_input(model: onnx.ModelProto, old: str, new: str) -> None:
    for other in model.graph.node:
        for position, read in enumerate(other.input):
            if read == old:
                other.input[position] = new


def bias_dropped(model: onnx.ModelProto) -> None:
    module = "model.layers.1.self_attn.k_proj"
    rename_input(model, f"{module}.biased", module)


def rows_of_another_part(model: onnx.ModelProto) -> None:
    prefix = "model.layers.1.self_attn.qkv_proj"
    key, value = (initializer(model, f"{prefix}.{part}.weight") for part in ("k", "v"))
    key.external_data[1].value = value.external_data[1].value
    assert key.external_data[1].key == "offset"


def norm_dropped(part: str) -> Plant:
    module = f"model.layers.1.self_attn.{part}_norm"

    def plant(model: onnx.ModelProto) -> None:
        rename_input(model, module, node(model, module).input[0])

    return plant


def norm_changed(part: str, key: str, value: float) -> Plant:
    def plant(model: onnx.ModelProto) -> None:
        norm = node(model, f"model.layers.1.self_attn.{part}_norm")
        found = attribute(norm, key)
        found.CopyFrom(helper.make_attribute(key, value))

    return plant


def window_includes_its_edge(model: onnx.ModelProto) -> None:
    node(model, "window_mask").op_type = "GreaterOrEqual"


def window_of_the_first_query(model: onnx.ModelProto) -> None:
    """Right in every step of one token, wrong in a longer one."""
    source = node(model, "last_hidden_key")
    first = numpy_helper.from_array(np.array([0], np.int64), "first_row")
    model.graph.initializer.append(first)
    index = list(model.graph.node).index(source)
    inputs = [source.input[0], "first_row"]
    gather = helper.make_node("Gather", inputs, ["first_query"], name="first_query", axis=2)
    model.graph.node.insert(index, gather)
    node(model, "last_hidden_key").input[0] = "first_query"


def too_few_elements_turned(model: onnx.ModelProto) -> None:
    """Everywhere, with tables to match: no shape disagrees."""
    for one in model.graph.node:
        if one.op_type == "RotaryEmbedding":
            attribute(one, "rotary_embedding_dim").i = 16
    for tensor in (initializer(model, name) for name in ("rope_cos", "rope_sin")):
        narrow = numpy_helper.to_array(tensor)[:, :8].copy()
        tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))


def rest_of_the_attention_scale_left_out(model: onnx.ModelProto) -> None:
    prefix = "model.layers.1.self_attn"
    rename_input(model, f"{prefix}.q_scaled", f"{prefix}.q_rope")


ATTENDED = r"layers.1.self_attn.merged \(prefill\) differs"
"""What the quantizer behind the attention reads: the first tensor that is compared there."""

FAULTS: list[tuple[str, Plant, str]] = [
    # Caught by the guard.
    (LLAMA, rotary_taken_apart, "3 ROTARY_EMBEDDING layers, wanted 4"),
    (LLAMA, nonpad_kv_seqlen, "ATTENTION_INPUT layer .*no mask.*UPPER_LEFT.*nonpad_kv_seqlen"),
    (LLAMA, mask_left_out, f"ATTENTION_INPUT layer '{ATTENTION}.*no mask"),
    (LLAMA, float_mask, "mask of BF16, wanted BOOL"),
    (LLAMA, cache_input_dropped, "past_value.1 is missing"),
    (LLAMA, cache_input_unread, "no layer of the network reads the input past_value.1"),
    (LLAMA, input_added, r"attention_bias is \(-1,\), wanted none"),
    (LLAMA, output_renamed, "logits is missing.*scores is .*wanted none"),
    # Caught by the constants.
    (LLAMA, scale("model.layers.1.mlp.down_proj.input_scale", 2.0), "down_proj.input_scale is"),
    (LLAMA, rope_of_another_theta, "constant rope_cos is"),
    # Caught by the values, at the first tensor behind the fault.
    (LLAMA, scale_of_another_linear, r"layers.1.mlp.down_proj.input.dq \(prefill\) differs"),
    (LLAMA, caches_swapped, r"present_(key|value).1 \(prefill\) differs"),
    (LLAMA, own_key_hidden, "a mask that hides all keys from a query is unknown"),
    (LLAMA, attention_scale_changed, r"layers.1.post_attention_layernorm \(prefill\) differs"),
    (LLAMA, epsilon_changed, r"logits \(prefill\) differs"),
    (LLAMA, positions_start_at_zero, r"\(decode 1\) differs"),
    (LLAMA, quantizer_left_out, r"logits \(prefill\) differs"),
    # Fails closed.
    (LLAMA, rotary_interleaved, "ROTARY_EMBEDDING layer .*interleaved = True is unknown"),
    (LLAMA, unknown_kind, "the kind SOFTMAX is unknown to the network check"),
    # What other architectures have.
    ("qwen2.5", bias_dropped, ATTENDED),
    ("qwen3", norm_dropped("q"), ATTENDED),
    ("qwen3", norm_dropped("k"), ATTENDED),
    ("qwen3", norm_changed("q", "axis", -2), ATTENDED),
    ("qwen3", norm_changed("k", "axis", 1), ATTENDED),
    ("qwen3", norm_changed("q", "epsilon", 1e-3), ATTENDED),
    ("qwen3", norm_changed("k", "epsilon", 1e-3), ATTENDED),
    ("phi4-mini", rows_of_another_part, "constant model.layers.1.self_attn.qkv_proj.k.weight is"),
    ("mistral-sliding", window_includes_its_edge, r"\(end of context\) differs"),
    ("mistral-sliding", window_of_the_first_query, r"\(chunk at end of context\) differs"),
    ("phi4-mini", too_few_elements_turned, "constant rope_(cos|sin) is"),
    ("phi3", rest_of_the_attention_scale_left_out, ATTENDED),
]


@pytest.mark.parametrize(("name", "plant", "message"), FAULTS)
def test_planted_fault_is_caught_and_named(
    root: Path, name: str, plant: Plant, message: str
) -> None:
    with pytest.raises(CheckError, match=f"(?s){message}"):
        check(decoder(root, name), plant)


def test_child_writes_its_result_or_fails_with_the_reason(root: Path) -> None:
    made, out, log = decoder(root), root / "out.json", root / "child.log"
    for plant in (mask_left_out, None):
        model = made.model("bfloat16")
        if plant is not None:
            plant(model)
        rtx = made.save(model, "rtx")
        job = {"paths": [rtx, made.dir / "cpu.onnx", out]}
        if plant is not None:
            with pytest.raises(ToolError, match="has no mask") as caught:
                run_child("check", job, stage="network-check", log_path=log)
            assert caught.value.returncode == 1
            assert not out.exists()
    run_child("check", job, stage="network-check", log_path=log)
    assert json.loads(out.read_text())["differences"]["logits"]["max_relative"] < 1e-5
