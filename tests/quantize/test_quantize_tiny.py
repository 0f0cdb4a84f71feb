"""Real ModelOpt on a tiny model: what the checkpoint holds, and that damage to it is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache import StageCache, digest_folder
from pipeline.convert.graph_writer import write_weights
from pipeline.convert.onnx_graph import build_decoder, save_graph
from pipeline.convert.simulate import load_simulation
from pipeline.convert.unified import UnifiedCheckpoint
from pipeline.errors import CorruptError, RecipeError
from pipeline.quantize.calibration import Calibration, check_amax
from pipeline.quantize.modelopt_fp8 import ModelOptFp8
from pipeline.quantize.verify import verify_checkpoint
from pipeline.runners.onnxruntime import OnnxRuntimeGraph, OnnxRuntimeSession
from pipeline.runners.transformers import TransformersSession
from pipeline.shapes import ModelShape, shape_of_config
from pipeline.stages import Checkpoint, Licence, Weights
from pipeline.text.topics import PydocTopics
from tests.tiny import VOCAB_SIZE, tiny_model

LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = tiny_model(tmp_path_factory.mktemp("model"))
    return Weights(
        dir=folder,
        origin="tiny",
        commit=None,
        files=digest_folder(folder),
        licence=Licence(spdx="Apache-2.0"),
    )


def quantizer(*keep: str) -> ModelOptFp8:
    calibration = Calibration(
        text=PydocTopics(part="calibrate"), calib_size=2, seq_len=64, batch_size=2, seed=0
    )
    return ModelOptFp8(calibration=calibration, keep_16bit=keep, device="cpu")


def quantize(weights: Weights, root: Path, *keep: str) -> Checkpoint:
    shape = ModelShape(**shape_of_config(UnifiedCheckpoint(weights.dir).config_json))
    return quantizer(*keep).quantize(weights, shape, StageCache(root=root))


@pytest.fixture(scope="module")
def made(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return quantize(weights, tmp_path_factory.mktemp("cache"), f"{LAYER}.mlp.down_proj")


def test_fused_tensors_share_one_scale_that_bfloat16_holds(made: Checkpoint) -> None:
    import ml_dtypes

    checkpoint = UnifiedCheckpoint(made.dir)
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        block = "self_attn" if "q_proj" in group else "mlp"
        names = [f"model.layers.0.{block}.{part}.weight_scale" for part in group]
        assert len({float(checkpoint.scalar(name)) for name in names}) == 1
    for name in checkpoint.tensors:
        if name.endswith((".weight_scale", ".input_scale")):
            scale = checkpoint.scalar(name)
            assert np.float32(scale.astype(ml_dtypes.bfloat16)) == scale


def test_kept_linear_is_bfloat16_and_listed_and_kv_scales_are_there(made: Checkpoint) -> None:
    checkpoint = UnifiedCheckpoint(made.dir)
    assert checkpoint.tensors[f"{LAYER}.mlp.down_proj.weight"].dtype == "bfloat16"
    assert made.kept_16bit == (f"{LAYER}.mlp.down_proj",)
    assert f"{LAYER}.mlp.down_proj" not in made.fp8_linears
    declared = json.loads((made.dir / "hf_quant_config.json").read_text())["quantization"]
    assert declared["kv_cache_quant_algo"] is None
    assert f"{LAYER}.mlp.down_proj" in declared["exclude_modules"]
    assert {"tokenizer.json", "LICENSE"} <= {path.name for path in made.dir.iterdir()}
    assert {f"{LAYER}.self_attn.k_proj.k_scale", f"{LAYER}.self_attn.v_proj.v_scale"} <= set(
        checkpoint.tensors
    )


def test_second_time_comes_from_the_cache(
    weights: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = quantize(weights, tmp_path)
    caplog.clear()
    with caplog.at_level("INFO"):
        assert quantize(weights, tmp_path).digest == first.digest
    assert "quantize: already done" in caplog.text
    assert "started" not in caplog.text


@pytest.mark.parametrize("pattern", ["model.layers.0.self_attn.q_proj", "model.layers.9.*"])
def test_pattern_that_splits_a_fused_group_or_matches_nothing_is_refused(
    weights: Weights, tmp_path: Path, pattern: str
) -> None:
    with pytest.raises(RecipeError, match=r"quantizer\.keep_16bit"):
        quantize(weights, tmp_path, pattern)
    assert not list((tmp_path / "stages" / "quantize").glob("*"))


def damaged(made: Checkpoint, out: Path, change: Any) -> Path:
    """A copy of the checkpoint with its tensors changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(made.dir, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    return out


def emptied(tensors: Any) -> None:
    name = f"{LAYER}.mlp.gate_proj.weight"
    tensors[name] = tensors[name][:0].clone()


def zeroed(tensors: Any) -> None:
    name = f"{LAYER}.mlp.gate_proj.weight"
    tensors[name] = tensors[name].new_zeros(tensors[name].shape)


def missing(tensors: Any) -> None:
    del tensors[f"{LAYER}.mlp.gate_proj.weight"]


def scale_doubled(tensors: Any) -> None:
    tensors[f"{LAYER}.mlp.gate_proj.weight_scale"] *= 2


def scale_not_a_number(tensors: Any) -> None:
    tensors[f"{LAYER}.mlp.gate_proj.input_scale"] *= float("nan")


def norm_changed(tensors: Any) -> None:
    tensors[f"{LAYER}.input_layernorm.weight"][3] += 0.01


def extra(tensors: Any) -> None:
    tensors["model.extra.weight"] = tensors["model.norm.weight"].clone()


def test_good_checkpoint_passes(made: Checkpoint) -> None:
    verify_checkpoint(made.dir, made.weights.dir, set(made.fp8_linears))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (emptied, "gate_proj.weight has shape"),
        (zeroed, "gate_proj.weight has"),
        (missing, "gate_proj.weight is missing"),
        (scale_doubled, "gate_proj.weight has"),
        (scale_not_a_number, "gate_proj.input_scale is nan"),
        (norm_changed, "input_layernorm.weight differs"),
        (extra, "model.extra.weight was not asked for"),
    ],
)
def test_damage_after_export_is_found_and_named(
    made: Checkpoint, tmp_path: Path, change: Any, named: str
) -> None:
    copy = damaged(made, tmp_path / "copy", change)
    with pytest.raises(CorruptError, match=named):
        verify_checkpoint(copy, made.weights.dir, set(made.fp8_linears))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_amax_that_is_no_range_names_its_layer(value: float) -> None:
    with pytest.raises(CorruptError, match=r"a\.input_quantizer"):
        check_amax({"a.input_quantizer": value, "b.input_quantizer": 1.0})


def test_outlier_layer_is_named() -> None:
    amax = {f"layers.{n}.down.input_quantizer": 1.0 for n in range(9)}
    assert check_amax(amax) == []
    (line,) = check_amax({**amax, "layers.9.down.input_quantizer": 200.0})
    assert "layers.9.down" in line


@pytest.mark.parametrize("layers", [(0,), (0, 2)])
def test_graph_of_one_and_two_layers_agrees_with_the_simulation(
    made: Checkpoint, tmp_path: Path, layers: tuple[int, ...]
) -> None:
    # Single positions may differ where a last-bit difference flips an E4M3 code.
    checkpoint = UnifiedCheckpoint(made.dir)
    slots = write_weights(checkpoint, tmp_path / "weights.bin")
    model = build_decoder(checkpoint, slots, context=64, activation="float32", layers=layers)
    save_graph(model, tmp_path / "graph.onnx")
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, 60).tolist()
    graph = OnnxRuntimeSession(OnnxRuntimeGraph(tmp_path / "graph.onnx", threads=1))
    simulated = TransformersSession(load_simulation(made.dir, layers=layers))
    worst = np.abs(graph.logits(tokens) - simulated.logits(tokens)).max(axis=-1)
    assert np.median(worst) < 1e-3
    assert (worst < 1e-3).mean() >= 0.9


def test_scale_doubled_in_the_graph_is_seen(made: Checkpoint, tmp_path: Path) -> None:
    copy = UnifiedCheckpoint(damaged(made, tmp_path / "copy", scale_doubled))
    slots = write_weights(copy, tmp_path / "weights.bin")
    save_graph(
        build_decoder(copy, slots, context=64, activation="float32"), tmp_path / "graph.onnx"
    )
    tokens = list(range(5, 45))
    graph = OnnxRuntimeSession(OnnxRuntimeGraph(tmp_path / "graph.onnx", threads=1))
    simulated = TransformersSession(load_simulation(made.dir))
    worst = np.abs(graph.logits(tokens) - simulated.logits(tokens)).max(axis=-1)
    assert np.median(worst) > 0.05


def test_quantize_linear_gives_the_codes_of_the_simulation(tmp_path: Path) -> None:
    import ml_dtypes
    import onnx
    import onnxruntime
    import torch

    from pipeline.convert.simulate import fake_quantize

    scale = 0.0123
    rng = np.random.default_rng(0)
    midpoints = (np.arange(-448, 448) + 0.5) * scale
    values = np.concatenate(
        [rng.normal(0, 1, 10_000), rng.normal(0, 1e-4, 2000), midpoints, [1e5, -1e5, np.inf, 0.0]]
    ).astype(np.float32)
    helper, kind = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "codes",
        [helper.make_tensor_value_info("x", kind.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", kind.FLOAT, ["n"])],
        [
            onnx.numpy_helper.from_array(np.array(scale, np.float32), "s"),
            onnx.numpy_helper.from_array(np.zeros((), ml_dtypes.float8_e4m3fn), "z"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (got,) = session.run(None, {"x": values})
    wanted = fake_quantize(torch.from_numpy(values), float(np.float32(scale))).numpy()
    np.testing.assert_array_equal(got, wanted)
