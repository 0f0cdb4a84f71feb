"""The network check on every architecture: the good network passes, its own faults are caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from pipeline.formats.trtrtx.network import CheckError
from pipeline.formats.trtrtx.network_check import check_network
from tests.architectures import ARCHITECTURES, WINDOW
from tests.formats.trtrtx.network_check_graph import TinyDecoder, node

Plant = Callable[[onnx.ModelProto], None]

CONTEXT = 48
"""Beyond the window, so that it hides keys at the end of the context."""
assert WINDOW < CONTEXT


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


def decoder(root: Path, name: str) -> TinyDecoder:
    folder = root / name
    made = TinyDecoder(folder, name, CONTEXT)
    if not (folder / "cpu.onnx").is_file():
        made.save(made.model("float32"), "cpu")
    return made


def check(
    made: TinyDecoder, plant: Plant, dtype: Literal["bfloat16", "float16"] = "bfloat16"
) -> dict[str, Any]:
    """Run the check with a fault in the RTX file only."""
    model = made.model(dtype)
    plant(model)
    rtx = made.save(model, "rtx")
    return check_network(rtx, made.dir / "cpu.onnx")


def nothing(model: onnx.ModelProto) -> None:
    """The good network."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_good_network_agrees_with_its_twin_at_float32_accuracy(root: Path, name: str) -> None:
    result = check(decoder(root, name), nothing)
    assert result["differences"]["logits"]["max_relative"] < 1e-5
    assert result["differences"]["caches"]["max_relative"] < 1e-5
    assert result["differences"]["quantized_values"]["max_relative"] == 0  # Not one code flipped.
    assert result["constants_rounded"] == ["rope_cos", "rope_sin"]
    assert result["layer_kinds"]["ROTARY_EMBEDDING"] == 4
    # All weights are compared: seven linears, three biases in Qwen2, norms, embedding.
    weights = 2 * (7 + 2 + 3 * name.startswith("qwen")) + 2
    assert result["constants_equal"] > weights


@pytest.mark.parametrize("name", ["qwen2.5", "phi4-mini"])
def test_float16_network_agrees_as_well(root: Path, name: str) -> None:
    result = check(decoder(root, name), nothing, "float16")
    assert result["differences"]["logits"]["max_relative"] < 1e-5


def rename_input(model: onnx.ModelProto, old: str, new: str) -> None:
    for other in model.graph.node:
        for position, read in enumerate(other.input):
            if read == old:
                other.input[position] = new


def bias_dropped(model: onnx.ModelProto) -> None:
    module = "model.layers.1.self_attn.k_proj"
    rename_input(model, f"{module}.biased", module)


def bias_doubled(model: onnx.ModelProto) -> None:
    add = node(model, "model.layers.1.self_attn.k_proj.biased")
    twice = helper.make_node("Add", [add.input[1]] * 2, ["twice"], name="twice")
    model.graph.node.insert(0, twice)
    add.input[1] = "twice"


def rows_of_another_part(model: onnx.ModelProto) -> None:
    prefix = "model.layers.1.self_attn.qkv_proj"
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    key, value = (tensors[f"{prefix}.{part}.weight"] for part in ("k", "v"))
    key.external_data[1].value = value.external_data[1].value
    assert key.external_data[1].key == "offset"


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


def whole_head_turned(model: onnx.ModelProto) -> None:
    rope = node(model, "model.layers.1.self_attn.k_rope")
    rope.attribute.remove(next(a for a in rope.attribute if a.name == "rotary_embedding_dim"))


def too_few_elements_turned(model: onnx.ModelProto) -> None:
    """Everywhere, with tables to match: no shape disagrees."""
    for one in model.graph.node:
        if one.op_type == "RotaryEmbedding":
            next(a for a in one.attribute if a.name == "rotary_embedding_dim").i = 16
    for tensor in model.graph.initializer:
        if tensor.name in ("rope_cos", "rope_sin"):
            narrow = numpy_helper.to_array(tensor)[:, :8].copy()
            tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))


def rest_of_the_attention_scale_left_out(model: onnx.ModelProto) -> None:
    prefix = "model.layers.1.self_attn"
    rename_input(model, f"{prefix}.q_scaled", f"{prefix}.q_rope")


ATTENDED = r"layers.1.self_attn.merged \(prefill\) differs"
"""What the quantizer behind the attention reads: the first tensor that is compared there."""

FAULTS: list[tuple[str, Plant, str]] = [
    ("qwen2.5", bias_dropped, ATTENDED),
    ("qwen2.5", bias_doubled, ATTENDED),
    ("phi4-mini", rows_of_another_part, "constant model.layers.1.self_attn.qkv_proj.k.weight is"),
    ("mistral-sliding", window_includes_its_edge, r"\(end of context\) differs"),
    ("mistral-sliding", window_of_the_first_query, r"\(chunk at end of context\) differs"),
    ("phi4-mini", whole_head_turned, "cannot parse .*cosCache's last dimension is 12"),
    ("phi4-mini", too_few_elements_turned, "constant rope_(cos|sin) is"),
    ("phi3", rest_of_the_attention_scale_left_out, ATTENDED),
]


@pytest.mark.parametrize(
    ("name", "plant", "message"),
    FAULTS,
    ids=[f"{name}-{plant.__name__}" for name, plant, _ in FAULTS],
)
def test_planted_fault_is_caught_and_named(
    root: Path, name: str, plant: Plant, message: str
) -> None:
    with pytest.raises(CheckError, match=f"(?s){message}"):
        check(decoder(root, name), plant)
