"""The real TensorRT-RTX on a tiny FP8 model: what the plan proves, and what the proof refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.cache import StageCache, digest_folder
from pipeline.compilers.rtx_plan import PlanError, prove_fp8, read_plan
from pipeline.compilers.trtrtx import PLAN_FILE, TrtRtxCompiler
from pipeline.config.folders import data_dir
from pipeline.convert.unified import UnifiedCheckpoint
from pipeline.errors import ToolError
from pipeline.hardware import Target
from pipeline.process import run_tool
from pipeline.quantize.calibration import Calibration
from pipeline.quantize.modelopt_fp8 import ModelOptFp8
from pipeline.shapes import ModelShape, shape_of_config
from pipeline.stages import Checkpoint, Engine, Licence, Weights
from pipeline.text.topics import PydocTopics
from tests.tiny import tiny_model

KEPT = "model.layers.1.mlp.down_proj"
SETTINGS: dict[str, Any] = {
    "max_batch_size": 2,
    "opt_batch_size": 1,
    "max_prefill_batch_size": 1,
    "max_seq_len": 64,
    "activation_dtype": "bfloat16",
    "kv_cache_dtype": "bfloat16",
}


def target(name: str) -> Target:
    import yaml

    fields = yaml.safe_load((data_dir("conf") / "target" / f"{name}.yaml").read_text())
    fields.pop("_target_")
    return Target(**fields)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tiny_model(tmp_path_factory.mktemp("model"))
    weights = Weights(
        dir=folder,
        origin="tiny",
        commit=None,
        files=digest_folder(folder),
        licence=Licence(spdx="Apache-2.0"),
    )
    calibration = Calibration(
        text=PydocTopics(part="calibrate"), calib_size=2, seq_len=64, batch_size=2, seed=0
    )
    quantizer = ModelOptFp8(calibration=calibration, keep_16bit=(KEPT,), device="cpu")
    shape = ModelShape(**shape_of_config(UnifiedCheckpoint(folder).config_json))
    return quantizer.quantize(weights, shape, StageCache(root=tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp("compile")
    return TrtRtxCompiler(**SETTINGS).compile(
        checkpoint, target("rtx4090"), StageCache(root=root / "cache"), root / "logs"
    )


@pytest.fixture(scope="module")
def plan(engine: Engine) -> bytes:
    return (engine.dir / PLAN_FILE).read_bytes()


def proof(plan: bytes, checkpoint: Checkpoint, **changed: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "sm": 89,
        "profiles": 2,
        "fp8_linears": checkpoint.fp8_linears,
        "kept_16bit": checkpoint.kept_16bit,
    }
    return prove_fp8(plan, **{**asked, **changed})


def test_every_fp8_linear_is_proven_in_both_profiles(
    engine: Engine, checkpoint: Checkpoint
) -> None:
    assert engine.checks["fp8_plan"]["fp8_linears"] == 3 * 7 - 1 == len(checkpoint.fp8_linears)
    assert engine.checks["fp8_plan"]["profiles"] == 2
    assert engine.checks["network"]["layer_kinds"]["ATTENTION_OUTPUT"] == 2
    assert engine.sms == (89,)
    assert {"config.json", "tokenizer.json", "LICENSE", PLAN_FILE} <= {
        path.name for path in engine.dir.iterdir()
    }


def test_kept_linear_is_a_16bit_gemm_of_the_plan(plan: bytes) -> None:
    other = {name for gemm in read_plan(plan).gemms if not gemm.is_fp8 for name in gemm.modules}
    assert other == {KEPT, "lm_head"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sm": 120}, "sm120 was asked for"),
        ({"profiles": 3}, "3 were asked for"),
        ({"fp8_linears": ["model.layers.7.mlp.up_proj"]}, "does not compute 1 linears in FP8"),
        ({"fp8_linears": [], "kept_16bit": [KEPT]}, "unexpected FP8 GEMMs"),
        ({"kept_16bit": []}, "unexpected 16-bit GEMMs, first " + KEPT),
    ],
)
def test_plan_with_something_else_is_refused(
    plan: bytes, checkpoint: Checkpoint, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        proof(plan, checkpoint, **changed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda plan: plan[:40], "no TensorRT-RTX plan"),
        (lambda plan: b"x" + plan[1:], "no TensorRT-RTX plan"),
        (lambda plan: plan[:25] + b"\x08" + plan[26:], "format is not known here"),
        (lambda plan: plan.replace(b"accelerators=", b"accelerat0rs="), "no readable section"),
        (lambda plan: plan.replace(b"input={", b"inputs={"), "cannot be read"),
        (lambda plan: plan.replace(b"type=fp8_e4m3", b"type=bf16    "), "in FP8"),
    ],
)
def test_plan_that_cannot_be_read_or_is_not_fp8_fails_closed(
    plan: bytes, checkpoint: Checkpoint, damage: Any, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        proof(damage(plan), checkpoint)


def test_weight_only_graph_that_builds_silently_is_not_proven(
    checkpoint: Checkpoint, engine: Engine, tmp_path: Path
) -> None:
    import sys

    import onnx

    from pipeline.compilers.network_check.stage import interface_of
    from pipeline.compilers.rtx_child import CompileJob
    from pipeline.convert.stage import RTX_GRAPH

    assert engine.twin_dir is not None
    model = onnx.load(engine.twin_dir / RTX_GRAPH, load_external_data=False)
    sources = {node.output[0]: node.input[0] for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[0].endswith(".input.dq"):
            node.input[0] = sources[sources[node.input[0]]]
    onnx.save(model, tmp_path / RTX_GRAPH)
    (tmp_path / "weights.bin").symlink_to(engine.twin_dir / "weights.bin")
    config = UnifiedCheckpoint(checkpoint.dir).config
    CompileJob(
        graph=str(tmp_path / RTX_GRAPH),
        interface=interface_of(config, num_layers=3, context=64, dtype="bfloat16"),
        plan=str(tmp_path / "plan"),
        sm=89,
        profiles=TrtRtxCompiler(**SETTINGS).profiles,
    ).write(tmp_path / "job.json")
    command = [sys.executable, "-m", "pipeline.compilers.rtx_child", str(tmp_path / "job.json")]
    run_tool(command, stage="compile", log_path=tmp_path / "log")
    with pytest.raises(PlanError, match="in FP8"):
        proof((tmp_path / "plan").read_bytes(), checkpoint)


def test_failing_compiler_keeps_its_log_and_leaves_nothing(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    cache = StageCache(root=tmp_path / "cache")
    h100 = target("h100")  # TensorRT-RTX has no Hopper
    with pytest.raises(ToolError, match="SM90") as caught:
        TrtRtxCompiler(**SETTINGS).compile(checkpoint, h100, cache, tmp_path / "logs")
    assert "SM90" in caught.value.log_path.read_text()
    assert not list((cache.root / "stages" / "compile").glob("*"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "must be activation_dtype"),
        ({"opt_batch_size": 3}, "must be <= max_batch_size"),
        ({"max_prefill_batch_size": 3}, "must be <= max_batch_size"),
        ({"max_batch_size": 0}, "greater than 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrtRtxCompiler(**{**SETTINGS, **changed})
