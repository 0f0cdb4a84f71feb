"""W4A16 in TensorRT-RTX: compiled for a card that is not here, proven and checked; faults in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from pipeline.core.cache import StageCache
from pipeline.core.values import Checkpoint, Engine
from pipeline.formats.trtrtx.compiler import TrtRtxCompiler
from pipeline.formats.trtrtx.network import CheckError
from pipeline.formats.trtrtx.network_check import check_network
from pipeline.formats.trtrtx.onnx_graph import CPU_CUT, RTX_CUT
from pipeline.formats.trtrtx.plan_text import PlanError, prove_plan
from pipeline.formats.trtrtx.spec import PLAN_FILE
from pipeline.quant.w4a16 import SPEC, W4a16Quantizer
from tests.architectures import tiny_architecture
from tests.formats.trtrtx.network_check_graph import initializer, node
from tests.quant.tiny_quantized import ADA, CALIBRATION, local_weights

KEPT = "model.layers.0.mlp.down_proj"
LINEAR = "model.layers.1.self_attn.o_proj"
COMPILER = TrtRtxCompiler(
    max_batch_size=2,
    opt_batch_size=1,
    max_prefill_batch_size=1,
    max_seq_len=64,
    activation_dtype="bfloat16",
    kv_cache_dtype="bfloat16",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("w4a16")


@pytest.fixture(scope="module")
def checkpoint(root: Path) -> Checkpoint:
    weights = local_weights(tiny_architecture("llama", root / "model"))
    quantizer = W4a16Quantizer(keep_16bit=(KEPT,), device="cpu")
    return quantizer.quantize(weights, CALIBRATION, StageCache(root=root / "cache"))


@pytest.fixture(scope="module")
def engine(root: Path, checkpoint: Checkpoint) -> Engine:
    return COMPILER.compile(checkpoint, ADA, StageCache(root=root / "cache"), root / "logs")


def test_every_linear_is_multiplied_from_4_bits(engine: Engine, checkpoint: Checkpoint) -> None:
    assert engine.variant == "sm89-trtrtx-w4a16-b2-s64"
    plan, network = engine.checks["plan"], engine.checks["network"]
    assert plan["quantized_linears"] == len(checkpoint.quantized_linears) == 3 * 7 - 1
    # Seven linears of codes and scales in each of two layers are compared, value by value.
    assert network["constants_equal"] > 2 * 2 * 7
    assert network["differences"]["logits"]["max_relative"] < 1e-5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("type=int4", "type=int8", "does not compute 20 linears in W4A16"),
        ('name="int4_block_dq', 'name="int5_block_dq', "does not compute 20 linears in W4A16"),
        ('fully_connected={ name="lm_head', 'fully_connected={ name="lm_haed', "first lm_haed"),
    ],
)
def test_plan_that_is_not_what_was_asked_for_is_refused(
    engine: Engine, checkpoint: Checkpoint, old: str, new: str, message: str
) -> None:
    plan = (engine.dir / PLAN_FILE).read_bytes()
    assert old.encode() in plan
    with pytest.raises(PlanError, match=message):
        prove_plan(
            plan.replace(old.encode(), new.encode()),
            SPEC,
            sm=89,
            profiles=2,
            quantized_linears=checkpoint.quantized_linears,
            kept_16bit=checkpoint.kept_16bit,
        )


def scales_of_another(model: onnx.ModelProto) -> None:
    """A linear has the scales of the same linear of the next layer."""
    other = LINEAR.replace(".1.", ".2.")
    node(model, f"{LINEAR}.weight.dq").input[1] = f"{other}.weight_scale"


def codes_shifted(model: onnx.ModelProto) -> None:
    """The codes begin a byte late: every group has two codes of its neighbour."""
    (offset,) = (
        entry
        for entry in initializer(model, f"{LINEAR}.weight").external_data
        if entry.key == "offset"
    )
    offset.value = str(int(offset.value) + 1)


@pytest.mark.parametrize(
    ("plant", "message"),
    [(scales_of_another, "differs between the parsed network"), (codes_shifted, LINEAR)],
)
def test_network_check_catches_wrong_groups(
    engine: Engine, plant: Callable[[onnx.ModelProto], None], message: str
) -> None:
    assert engine.cpu_graph_dir is not None
    folder = engine.cpu_graph_dir
    model = onnx.load(folder / RTX_CUT, load_external_data=False)
    plant(model)
    faulty = folder / f"faulty-{plant.__name__}.onnx"
    faulty.write_bytes(model.SerializeToString())
    with pytest.raises(CheckError, match=message):
        check_network(faulty, folder / CPU_CUT)
