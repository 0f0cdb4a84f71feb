"""Speed figures, workloads, and what acceptance refuses or leaves out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.acceptance.speed import summarize
from pipeline.core.errors import RecipeError
from pipeline.runners.session import BatchOptions, Generation
from pipeline.runners.workload import Workload
from pipeline.sources.text.topics import PydocTopics
from tests.acceptance.questions import acceptance, speed_of
from tests.specs import tiny_spec

LOAD = Workload(name="b2", batch=2, isl=5, osl=4, min_output_tokens_per_s=1.0)
SHAPE = tiny_spec()


def generation(ttft_s: float, total_s: float) -> Generation:
    return Generation(tokens=np.zeros((2, 4), np.int64), ttft_s=ttft_s, total_s=total_s)


@dataclass
class Scripted:
    """A session that takes the times it is told, and notes its turn."""

    name: str
    totals_s: list[float]
    turns: list[str]
    prompts: list[Sequence[Sequence[int]]] = field(default_factory=list)

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, options: BatchOptions | None = None
    ) -> Generation:
        assert osl == LOAD.osl
        self.turns.append(self.name)
        self.prompts.append(prompts)
        return generation(0.5, self.totals_s.pop(0))

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        raise NotImplementedError

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: frozenset[int]
    ) -> Iterator[int]:
        raise NotImplementedError


def test_contenders_alternate_on_the_same_prompts_and_warm_up_is_discarded() -> None:
    turns: list[str] = []
    engine = Scripted("engine", [100.0, 1.0, 2.0, 4.0], turns)
    baseline = Scripted("transformers", [100.0, 4.0, 4.0, 4.0], turns)
    samples = speed_of(
        LOAD, {"engine": engine, "transformers": baseline}, vocab_size=9, repeats=3, seed=0
    )
    assert turns == ["engine", "transformers", "transformers", "engine"] * 2
    assert engine.prompts == baseline.prompts
    assert [run.output_tokens_per_s for run in samples["engine"]] == [8.0, 4.0, 2.0]
    entry = summarize(LOAD, samples["engine"])
    assert entry["output_tokens_per_s"] == 4.0
    assert entry["samples"] == [8.0, 4.0, 2.0]
    assert entry["min_output_tokens_per_s"] == 1.0


def test_digest_of_a_workload_leaves_thresholds_and_name_out() -> None:
    assert dataclasses.replace(LOAD, name="x", min_output_tokens_per_s=9.0).digest == LOAD.digest
    assert dataclasses.replace(LOAD, osl=5).digest != LOAD.digest


def test_model_beyond_memory_or_time_is_not_run() -> None:
    judge = acceptance()
    need = 12 * SHAPE.params
    assert judge.too_much(SHAPE, need) is None
    assert "GB RAM" in str(judge.too_much(SHAPE, need - 1))
    tokens = 2 * (4 + 2) * 64
    seconds = 2.0 * SHAPE.params * tokens / 1e11
    assert acceptance(time_limit_s=seconds).too_much(SHAPE, need) is None
    assert "time_limit_s" in str(acceptance(time_limit_s=seconds * 0.999).too_much(SHAPE, need))


def test_text_that_calibration_has_seen_is_refused() -> None:
    judge = acceptance()
    judge.check_text(PydocTopics(part="calibrate").documents())
    with pytest.raises(RecipeError, match=r"acceptance\.text: shares \d+ runs of 13 words"):
        judge.check_text(PydocTopics(part="judge").documents()[:1])


def test_windows_beyond_the_context_are_named() -> None:
    acceptance().check_inputs(SHAPE, 64)
    with pytest.raises(RecipeError) as caught:
        acceptance().check_inputs(SHAPE, 8)
    paths = [fault.path for fault in caught.value.faults]
    assert paths == ["acceptance.window_tokens"]
