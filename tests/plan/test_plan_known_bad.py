from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.model.read import read_spec
from pipeline.plan import PlanRequest, make_plan
from pipeline.plan.known_bad import known_bad_table, matching_rows, parse_table
from tests.specs import published

Ask = Callable[..., PlanRequest]
RTX = {"format": "trtrtx", "runtime": ("tensorrt-rtx", "1.7.1"), "kv_cache_dtype": "float16"}
TRTLLM = {"format": "trtllm", "runtime": ("tensorrt-llm", "1.2.1")}
BLOCK = {"facts": {"weight_scales": "block"}}
MTP = {"facts": {"speculation": "mtp"}}

LONGROPE = read_spec(published("phi-4-mini-instruct"))

# Row -> a request that meets it, and changes that lead to neighbours which do not.
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "qwen2-fp8-kv-cache": (
        {"model": "qwen2.5"},
        [{"kv_cache_dtype": "bfloat16"}, {"model": "llama3.1"}],
    ),
    "fp8-below-sm89": (
        {"target": "a100"},
        [{"target": "l4"}, {"precision": "bf16"}],
    ),
    "block-fp8-on-ada-trtllm": (
        TRTLLM | BLOCK,
        [{"target": "h100"}, {"facts": {}}, {"format": "checkpoint"}],
    ),
    "block-fp8-on-ada": (
        BLOCK,
        [{"target": "rtx5090"}, {"facts": {"weight_scales": "tensor"}}, {"format": "trtllm"}],
    ),
    "vllm-ada-fp8-kv-mtp": (
        MTP,
        [
            {"target": "h100"},
            {"kv_cache_dtype": "bfloat16"},
            {"facts": {"speculation": "ngram"}},
            {"facts": {}},
            {"runtime": ("sglang", "0.5")},
        ],
    ),
    "vllm-ada-old-cuda": (
        {"facts": {"cuda": "12.3.2"}},
        [
            {"facts": {"cuda": "12.4"}},
            {"facts": {"cuda": "13.0"}},
            {"facts": {}},
            {"target": "h100"},
            {"precision": "bf16"},
        ],
    ),
    "trtllm-engines-are-gone": (
        TRTLLM | {"runtime": ("tensorrt-llm", "1.3.0rc22")},
        [
            {"runtime": ("tensorrt-llm", "1.2.1")},
            {"runtime": ("tensorrt-llm", "")},
            {"format": "checkpoint"},
        ],
    ),
    "rtx-not-for-datacenter": (RTX | {"target": "h200"}, [{"target": "rtx5090"}, TRTLLM]),
    "rtx-on-a100": (RTX | {"target": "a100", "precision": "bf16"}, [{"target": "l40s"}, TRTLLM]),
    "rtx-fp8-kv-cache": (
        RTX | {"kv_cache_dtype": "fp8"},
        [{"kv_cache_dtype": "float16"}, TRTLLM],
    ),
    "cuda-12.6-claim": (
        {"facts": {"cuda": "12.6.3"}},
        [{"facts": {"cuda": "12.8"}}, {"facts": {"cuda": "12"}}, {"facts": {}}],
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
    return {row.id for row in matching_rows(ask(**asked))}


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


def test_unknown_fact_is_a_bug_and_not_ignored(ask: Ask) -> None:
    with pytest.raises(ValueError, match=r"unknown facts \['cuda_version'\]"):
        make_plan(ask(facts={"cuda_version": "12.6"}))


ROW = "[{id: a, when: %s, severity: error, path: x, message: m, source: s}]"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (ROW % "{architectur: [Qwen2ForCausalLM]}", "architectur"),
        (ROW % "{sm_below: '89'}", "sm_below"),
        (ROW % "{}", "without conditions"),
        ((ROW % "{sm: [89]}").replace("error", "fatal"), "severity"),
        ((ROW % "{sm: [89]}").replace("source: s", "url: s"), "url"),
        ((ROW % "{sm: [89]}")[:-1] + ", " + (ROW % "{sm: [90]}")[1:], "share an id"),
    ],
)
def test_faulty_table_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_table(text)
