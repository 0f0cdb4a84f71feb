"""The data that plans are made of: cards, model shapes, and what is known to be bad."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipeline.core.hardware import GIB, Target
from pipeline.core.settings import data_dir
from pipeline.model.read import read_spec
from pipeline.model.spec import ModelSpec
from pipeline.plan import conditions_of, known_bad_table, make_plan
from pipeline.plan.sizes import PlanRequest
from tests.specs import published

Ask = Callable[..., PlanRequest]
LONGROPE = read_spec(published("phi-4-mini-instruct"))
RTX = {"format": "trtrtx", "runtime": ("tensorrt-rtx", "1.7.1"), "kv_cache_dtype": "float16"}

# Row -> a request that meets it, and changes that lead to neighbours which do not.
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "qwen2-fp8-kv-cache": (
        {"model": "qwen2.5"},
        [{"kv_cache_dtype": "bfloat16"}, {"model": "llama3.1"}],
    ),
    "qwen3-trtllm-build": (
        {"model": "qwen3-4b", "format": "trtllm"},
        [{"format": "checkpoint"}, {"model": "qwen2.5", "kv_cache_dtype": "bfloat16"}],
    ),
    "gemma3-float16": (
        {"model": "gemma3", "format": "checkpoint", "kv_cache_dtype": "float16"},
        [{"kv_cache_dtype": "bfloat16"}, {"model": "llama3.1"}],
    ),
    "fp8-below-sm89": ({"target": "a100"}, [{"target": "l4"}]),
    "rtx-not-for-datacenter": (
        RTX | {"target": "h200"},
        [{"target": "rtx5090"}, {"format": "trtllm"}],
    ),
    "context-beyond-sliding-window": (
        {"model": "phi3", "max_seq_len": 2048},
        [{"max_seq_len": 2047}, {"model": "llama3.1"}],
    ),
    "longrope-beyond-original-context": (
        {"model": LONGROPE, "max_seq_len": 4097},
        [{"max_seq_len": 4096}, {"model": "phi3", "max_seq_len": 2047}],
    ),
}


def fired(ask: Ask, asked: dict[str, Any]) -> set[str]:
    return {row.id for row in known_bad_table() if row.holds(conditions_of(ask(**asked)))}


def test_every_row_has_a_case() -> None:
    assert {row.id for row in known_bad_table()} == set(CASES)


@pytest.mark.parametrize("row_id", CASES)
def test_row_fires_on_its_request_and_not_on_the_neighbours(row_id: str, ask: Ask) -> None:
    asked, neighbours = CASES[row_id]
    assert row_id in fired(ask, asked)
    for change in neighbours:
        assert row_id not in fired(ask, asked | change), change


@pytest.mark.parametrize("row_id", CASES)
def test_errors_refuse_and_the_rest_is_noted_with_its_source(row_id: str, ask: Ask) -> None:
    (row,) = [row for row in known_bad_table() if row.id == row_id]
    plan = make_plan(ask(**CASES[row_id][0]))
    faults = [fault for fault in plan.faults if row.message in fault.message]
    notes = [note for note in plan.notes if note.message == row.message]
    if row.severity == "error":
        assert [fault.path for fault in faults] == [row.path]
        assert row.source in faults[0].message
        assert not notes
    else:
        assert [(note.severity, note.source) for note in notes] == [(row.severity, row.source)]
        assert not faults


def test_rows_have_conditions_and_ids_of_their_own() -> None:
    table = known_bad_table()
    assert len({row.id for row in table}) == len(table)
    assert all(row.when for row in table)
    with pytest.raises(ValueError, match=r"architectur: .* is no condition"):
        replace(table[0], when={"architectur": ["Qwen2ForCausalLM"]})


def test_model_that_a_converter_cannot_express_is_refused_by_the_plan(ask: Ask) -> None:
    window = {"use_sliding_window": True, "max_window_layers": 14}
    mixed = read_spec(published("qwen2.5-7b-instruct", **window))
    (fault,) = make_plan(ask(mixed, format="trtllm", kv_cache_dtype="bfloat16")).faults
    assert str(fault).startswith("config.json: layer_types: mixes layers")
    assert "use compiler=checkpoint, which leaves the model as it is, or compiler=trtrtx" in str(
        fault
    )
    for name in ("trtrtx", "checkpoint"):
        assert make_plan(ask(mixed, format=name, kv_cache_dtype="bfloat16")).faults == ()


TARGETS = sorted(path.stem for path in (data_dir("conf") / "target").glob("*.yaml"))
# Parameter counts as the Hub's model cards and safetensors indices state them.
PARAMS = {
    "gemma3": 999_885_952,
    "smollm2": 134_515_008,
    "phi3": 3_821_079_552,
    "mistral": 7_248_023_552,
    "phi4-mini": 3_836_021_760,
    "qwen2.5": 7_615_616_512,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "llama3.1": 8_030_261_248,
}


@pytest.mark.parametrize("name", TARGETS)
def test_target_is_named_like_its_file_and_its_card_like_nvml(
    name: str, target_of: Callable[[str], Target]
) -> None:
    target = target_of(name)
    assert target.id == name
    assert target.card.startswith("NVIDIA-")
    assert " " not in target.card
    assert target.source
    assert target.memory_bytes == pytest.approx(target.memory_gib * GIB, abs=1)


@pytest.mark.parametrize("name", TARGETS)
def test_fp8_peak_is_twice_the_16bit_peak_and_only_where_the_card_has_it(
    name: str, target_of: Callable[[str], Target]
) -> None:
    # Dense peaks of one card, same accumulation: a sparse number slipping in breaks the ratio.
    target = target_of(name)
    if target.sm < 89:
        assert set(target.tflops) == {"fp16"}
    else:
        assert target.flops("fp8") == pytest.approx(2 * target.flops("fp16"), rel=0.01)


@pytest.mark.parametrize(
    ("name", "sms", "mhz"), [("rtx4090", 128, 2520), ("rtx4080", 76, 2505), ("rtx5090", 170, 2407)]
)
def test_geforce_peaks_are_those_with_fp32_accumulation(
    name: str, sms: int, mhz: int, target_of: Callable[[str], Target]
) -> None:
    # SMs x boost clock x FLOP per clock and SM: 512 in FP16 with FP32 accumulation on GeForce.
    assert target_of(name).flops("fp16") == pytest.approx(sms * mhz * 512 * 1e6, rel=0.01)


@pytest.mark.parametrize("name", PARAMS)
def test_shape_has_the_known_number_of_parameters(
    name: str, shape_of: Callable[[str], ModelSpec]
) -> None:
    assert shape_of(name).params == PARAMS[name]
