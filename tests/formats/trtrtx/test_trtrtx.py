"""The real compiler on a tiny model, for a card that is not here; faults in its plan's bytes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.cache import StageCache, digest_folder
from pipeline.core.errors import ToolError
from pipeline.core.values import Checkpoint, Engine
from pipeline.formats.trtrtx.compiler import TrtRtxCompiler, compile_graph
from pipeline.formats.trtrtx.onnx_graph import RTX_GRAPH
from pipeline.formats.trtrtx.plan_text import PlanError, prove_plan, read_plan
from pipeline.formats.trtrtx.spec import PLAN_FILE
from pipeline.quant.fp8 import SPEC
from tests.quant.tiny_quantized import ADA, tiny_checkpoint

E4M3 = "fp8_e4m3"
LINEAR = "model.layers.1.self_attn.o_proj"
GEMM = 'fully_connected={ name="'

FIELDS: dict[str, Any] = {
    "max_batch_size": 2,
    "opt_batch_size": 1,
    "max_prefill_batch_size": 1,
    "max_seq_len": 64,
    "activation_dtype": "bfloat16",
    "kv_cache_dtype": "bfloat16",
}
COMPILER = TrtRtxCompiler(**FIELDS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trtrtx")


@pytest.fixture(scope="module")
def checkpoint(root: Path) -> Checkpoint:
    return tiny_checkpoint(root, "model.layers.0.mlp.down_proj")


@pytest.fixture(scope="module")
def engine(root: Path, checkpoint: Checkpoint) -> Engine:
    return COMPILER.compile(checkpoint, ADA, StageCache(root=root / "cache"), root / "logs")


def test_engine_says_what_it_is(engine: Engine) -> None:
    assert engine.variant == "sm89-trtrtx-fp8-b2-s64"
    assert engine.sms == (89,)
    assert engine.limits.kv_cache_dtype == "bfloat16"
    plan_bytes = (engine.dir / PLAN_FILE).stat().st_size
    assert engine.min_vram_bytes == plan_bytes + 2 * 3 * (2 * 16) * 2 * 2 * 64
    assert {"tensorrt-rtx-cu13", "nvidia-modelopt"} <= set(engine.tools)
    assert engine.cpu_graph_dir is not None
    assert (engine.cpu_graph_dir / "cpu.onnx").is_file()


@pytest.fixture(scope="module")
def plan(engine: Engine) -> bytes:
    return (engine.dir / PLAN_FILE).read_bytes()


@pytest.fixture(scope="module")
def asked(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "sm": 89,
        "profiles": 2,
        "quantized_linears": checkpoint.quantized_linears,
        "kept_16bit": checkpoint.kept_16bit,
    }


FP8_NAME = f"type={E4M3}"
TWIN = LINEAR.replace(".1.", ".2.")
UNKNOWN = "model.layers.9.mlp.up_proj"


@pytest.mark.parametrize(
    ("old", "new", "change", "message"),
    [
        ("", "", {"sm": 120}, r"is for \('sm89',\), sm120 was asked for"),
        ("", "", {"profiles": 1}, r"has profiles \[0, 1\], 1 were asked for"),
        ("", "", {"more": [UNKNOWN]}, rf"1 linears in FP8, first {UNKNOWN}; FP8 was asked for"),
        ("", "", {"less": [LINEAR]}, f"unexpected FP8 GEMMs, first {LINEAR}"),
        (
            f'name="{TWIN}',
            f'name="{LINEAR}',
            {"less": [TWIN]},
            f"unexpected FP8 GEMMs, first {LINEAR}",
        ),
        (GEMM + "lm_head", GEMM + "lm_haed", {}, "unexpected 16-bit GEMMs, first lm_haed"),
        (FP8_NAME, "type=fp8_e5m2", {}, "does not compute 20 linears in FP8"),
        (FP8_NAME, f"typo={E4M3}", {}, "operand types of GEMM"),
        (GEMM, GEMM.replace("name", "mane"), {}, "GEMMs that cannot be read"),
        ("accelerators={", "accelerated=={", {}, "no readable section"),
        ("vtrt", "vtrx", {}, "its header is missing"),
    ],
)
def test_plan_that_is_not_what_was_asked_for_is_refused(
    plan: bytes, asked: dict[str, Any], old: str, new: str, change: dict[str, Any], message: str
) -> None:
    assert len(old) == len(new)
    assert old.encode() in plan
    wanted = {*asked["quantized_linears"], *change.pop("more", ())} - {*change.pop("less", ())}
    changed = plan.replace(old.encode(), new.encode()) if old else plan
    with pytest.raises(PlanError, match=message):
        prove_plan(changed, SPEC, **{**asked, "quantized_linears": wanted, **change})


@pytest.mark.parametrize("position", [24, 25, 26])
def test_plan_of_another_version_is_refused(plan: bytes, position: int) -> None:
    changed = bytearray(plan)
    changed[position] += 1
    with pytest.raises(PlanError, match=r"text format is not known here; use 1\.7\.1"):
        read_plan(bytes(changed))


def test_full_disk_under_the_plan_is_no_finished_engine(
    root: Path, engine: Engine, checkpoint: Checkpoint
) -> None:
    """The library itself reports success when what it hands its pieces to fails."""
    assert engine.cpu_graph_dir is not None
    graph = engine.cpu_graph_dir / RTX_GRAPH
    with pytest.raises(OSError, match="No space left"):
        compile_graph(graph, Path("/dev/full"), 89, COMPILER.profiles)


def test_card_that_the_compiler_does_not_know_fails_with_its_log(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    hopper = dataclasses.replace(ADA, sm=90)  # TensorRT-RTX has no data-centre Hopper
    with pytest.raises(ToolError, match="SM90") as caught:
        COMPILER.compile(checkpoint, hopper, StageCache(root=tmp_path / "cache"), tmp_path)
    assert "SM90" in caught.value.log_path.read_text()
    assert list((tmp_path / "cache" / "stages" / "compile-trtrtx").iterdir()) == []


def planted_graph(root: Path, engine: Engine, place: Path, graph: bytes) -> StageCache:
    """A cache in which the compiler finds another graph than the converter wrote."""
    assert engine.cpu_graph_dir is not None
    shutil.copytree(root / "cache", place)
    for finished in (place / "stages" / "compile-trtrtx").iterdir():
        shutil.rmtree(finished)
    converted = place / "stages" / "convert" / engine.cpu_graph_dir.name
    (converted / RTX_GRAPH).write_bytes(graph)
    record = json.loads((converted / "stage.json").read_text())
    record["files"] = [f.to_json() for f in digest_folder(converted, frozenset({"stage.json"}))]
    (converted / "stage.json").write_text(json.dumps(record))
    return StageCache(root=place)


def without_activation_quantizers(graph: bytes) -> bytes:
    """FP8 weights only: every linear's input as it was before it was rounded to FP8."""
    import onnx

    model = onnx.load_from_string(graph)
    nodes = list(model.graph.node)
    rounded = {n.output[0]: n.input[0] for n in nodes if n.op_type == "QuantizeLinear"}
    direct = {}
    for node in nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] in rounded:
            direct[node.output[0]] = rounded[node.input[0]]
        elif node.op_type != "QuantizeLinear":
            continue
        model.graph.node.remove(node)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = direct.get(name, name)
    assert direct
    return bytes(model.SerializeToString())


def test_weight_only_fp8_graph_builds_no_engine(
    root: Path, engine: Engine, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    assert engine.cpu_graph_dir is not None
    graph = without_activation_quantizers((engine.cpu_graph_dir / RTX_GRAPH).read_bytes())
    cache = planted_graph(root, engine, tmp_path / "cache", graph)
    with pytest.raises(PlanError, match=r"does not compute 20 linears in FP8, first model\."):
        COMPILER.compile(checkpoint, ADA, cache, tmp_path / "logs")
    assert list((tmp_path / "cache" / "stages" / "compile-trtrtx").iterdir()) == []


def test_fp8_cache_is_a_recipe_fault() -> None:
    with pytest.raises(ValueError, match=r"kv_cache_dtype \(fp8\) must be activation_dtype") as e:
        TrtRtxCompiler(**{**FIELDS, "kv_cache_dtype": "fp8"})
    assert "compiler=checkpoint" in str(e.value)


def test_inputs_change_with_whatever_shapes_the_engine() -> None:
    inputs = COMPILER.inputs(ADA)
    assert COMPILER.inputs(dataclasses.replace(ADA, card="other", power_w=1)) == inputs
    assert COMPILER.inputs(dataclasses.replace(ADA, sm=120)) != inputs
    for change in (
        {"max_batch_size": 3},
        {"opt_batch_size": 2},
        {"max_prefill_batch_size": 2},
        {"max_seq_len": 65},
        {"activation_dtype": "float16", "kv_cache_dtype": "float16"},
    ):
        assert TrtRtxCompiler(**{**FIELDS, **change}).inputs(ADA) != inputs
