from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipeline.build import plan_of
from pipeline.config.folders import config_folders
from pipeline.config.load import load
from pipeline.model.read import read_spec
from pipeline.plan import PlanRequest, make_plan
from pipeline.plan.findings import conditions_of, known_bad_table
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
# Row -> the recipe and overrides that a person would give to meet it.
COMMANDS: dict[str, tuple[str, ...]] = {
    "qwen2-fp8-kv-cache": ("qwen2.5", "compiler.kv_cache_dtype=fp8"),
    "fp8-below-sm89": ("phi3", "target=a100"),
    "rtx-not-for-datacenter": ("llama3.1", "compiler=trtrtx", "target=h200"),
    "context-beyond-sliding-window": ("phi3", "compiler.max_seq_len=4096"),
}


def fired(ask: Ask, asked: dict[str, Any]) -> set[str]:
    return {row.id for row in known_bad_table() if row.holds(conditions_of(ask(**asked)))}


def test_every_row_has_a_case() -> None:
    assert {row.id for row in known_bad_table()} == set(CASES)


@pytest.mark.parametrize("row_id", COMMANDS)
def test_row_fires_for_a_recipe_as_people_ask_for_it(row_id: str) -> None:
    (row,) = [row for row in known_bad_table() if row.id == row_id]
    recipe, *overrides = COMMANDS[row_id]
    job = load(recipe, overrides, folders=config_folders(None))
    assert job.faults == ()
    plan = plan_of(job.value)
    messages = [*map(str, plan.faults), *(note.message for note in plan.notes)]
    assert any(row.message in message for message in messages)


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
