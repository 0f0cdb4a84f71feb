"""The plan reader on a real plan, and on that plan with faults planted in its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.cache import StageCache
from pipeline.core.values import Checkpoint
from pipeline.formats.trtrtx.compiler import TrtRtxCompiler
from pipeline.formats.trtrtx.plan_text import PlanError, prove_plan, read_plan
from pipeline.formats.trtrtx.spec import PLAN_FILE
from pipeline.quant.fp8 import SPEC
from tests.quant.tiny_quantized import ADA, tiny_checkpoint

E4M3 = "fp8_e4m3"

LINEAR = "model.layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def checkpoint(root: Path) -> Checkpoint:
    return tiny_checkpoint(root)


@pytest.fixture(scope="module")
def plan(root: Path, checkpoint: Checkpoint) -> bytes:
    compiler = TrtRtxCompiler(
        max_batch_size=2,
        opt_batch_size=1,
        max_prefill_batch_size=1,
        max_seq_len=64,
        activation_dtype="bfloat16",
        kv_cache_dtype="bfloat16",
    )
    cache = StageCache(root=root / "cache")
    return (compiler.compile(checkpoint, ADA, cache, root / "logs").dir / PLAN_FILE).read_bytes()


@pytest.fixture(scope="module")
def asked(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "sm": 89,
        "profiles": 2,
        "quantized_linears": checkpoint.quantized_linears,
        "kept_16bit": checkpoint.kept_16bit,
    }


def replaced(plan: bytes, old: bytes, new: bytes, count: int = -1) -> bytes:
    """The plan with bytes changed, its length as before."""
    assert len(old) == len(new)
    assert old in plan
    return plan.replace(old, new, count)


def test_real_plan_is_proven(plan: bytes, asked: dict[str, Any]) -> None:
    proof = prove_plan(plan, SPEC, **asked)
    assert (proof["profiles"], proof["quantized_gemms"], proof["quantized_linears"]) == (2, 24, 21)


def test_another_sm_is_refused(plan: bytes, asked: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"is for \('sm89',\), sm120 was asked for"):
        prove_plan(plan, SPEC, **{**asked, "sm": 120})


@pytest.mark.parametrize("profiles", [1, 3])
def test_wrong_number_of_profiles_is_refused(
    plan: bytes, asked: dict[str, Any], profiles: int
) -> None:
    message = rf"has profiles \[0, 1\], {profiles} were asked for"
    with pytest.raises(PlanError, match=message):
        prove_plan(plan, SPEC, **{**asked, "profiles": profiles})


def test_linear_that_is_not_in_the_plan_is_named(plan: bytes, asked: dict[str, Any]) -> None:
    wanted = (*asked["quantized_linears"], "model.layers.9.mlp.up_proj")
    with pytest.raises(PlanError, match=r"1 linears in FP8, first model\.layers\.9\.mlp\.up_proj"):
        prove_plan(plan, SPEC, **{**asked, "quantized_linears": wanted})


def test_fp8_gemm_that_was_not_asked_for_is_named(plan: bytes, asked: dict[str, Any]) -> None:
    wanted = [name for name in asked["quantized_linears"] if name != LINEAR]
    with pytest.raises(PlanError, match=f"unexpected FP8 GEMMs, first {LINEAR}"):
        prove_plan(plan, SPEC, **{**asked, "quantized_linears": wanted})


def test_linear_computed_twice_is_named(plan: bytes, asked: dict[str, Any]) -> None:
    twin = LINEAR.replace(".1.", ".2.")
    doubled = replaced(plan, f'name="{twin}'.encode(), f'name="{LINEAR}'.encode())
    wanted = [name for name in asked["quantized_linears"] if name != twin]
    with pytest.raises(PlanError, match=f"unexpected FP8 GEMMs, first {LINEAR}"):
        prove_plan(doubled, SPEC, **{**asked, "quantized_linears": wanted})


def test_16_bit_gemm_of_an_unknown_module_is_named(plan: bytes, asked: dict[str, Any]) -> None:
    renamed = replaced(plan, b'fully_connected={ name="lm_head', b'fully_connected={ name="lm_haed')
    with pytest.raises(PlanError, match="unexpected 16-bit GEMMs, first lm_haed"):
        prove_plan(renamed, SPEC, **asked)


def test_operands_of_another_type_are_no_fp8(plan: bytes, asked: dict[str, Any]) -> None:
    other = replaced(plan, f"type={E4M3}".encode(), b"type=fp8_e5m2")
    with pytest.raises(PlanError, match="does not compute 21 linears in FP8"):
        prove_plan(other, SPEC, **asked)


@pytest.mark.parametrize("position", [24, 25, 26])
def test_plan_of_another_version_is_refused(plan: bytes, position: int) -> None:
    changed = bytearray(plan)
    changed[position] += 1
    with pytest.raises(PlanError, match=r"text format is not known here; use 1\.7\.1"):
        read_plan(bytes(changed))


@pytest.mark.parametrize("size", [0, 63])
def test_truncated_header_is_refused(plan: bytes, size: int) -> None:
    with pytest.raises(PlanError, match="its header is missing"):
        read_plan(plan[:size])


@pytest.mark.parametrize("missing", [1, 3_000_000])
def test_plan_that_lacks_its_end_is_refused(plan: bytes, missing: int) -> None:
    size = len(plan)
    with pytest.raises(PlanError, match=f"has {size - missing} bytes, its header says {size}"):
        read_plan(plan[:-missing])


def test_plan_without_sections_is_refused(plan: bytes) -> None:
    with pytest.raises(PlanError, match="no readable section"):
        read_plan(replaced(plan, b"accelerators={", b"accelerated=={"))


def test_gemm_that_does_not_parse_is_refused(plan: bytes) -> None:
    with pytest.raises(PlanError, match="GEMMs that cannot be read"):
        read_plan(replaced(plan, b"fully_connected={ name=", b"fully_connected={ mane=", 1))


def test_operand_whose_type_is_not_stated_is_refused(plan: bytes) -> None:
    with pytest.raises(PlanError, match="operand types of GEMM"):
        read_plan(replaced(plan, f"type={E4M3}".encode(), b"typo=fp8_e4m3"))
