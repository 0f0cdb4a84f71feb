"""Answers that differ in length: drawn, or ended by end-of-sequence; on a real session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.acceptance.speed import SpeedSample, summarize
from pipeline.core.errors import PipelineError
from pipeline.runners.onnxruntime import graph_session
from pipeline.runners.runner import UNUSED_TOKEN, Generation
from pipeline.runners.workload import BatchOptions, Lengths, Workload
from tests.acceptance.questions import speed_of
from tests.formats.decoder.decoders import open_graph, write_graph
from tests.tiny import VOCAB_SIZE, tiny_model

PROMPTS = [[1, 2, 3, 4], [9, 8, 7, 6], [5, 5, 5, 5]]


def load(**changes: Any) -> Workload:
    return Workload(**{"name": "b2", "batch": 2, "isl": 8, "osl": 12, **changes})


def test_lengths_are_drawn_apart_from_the_prompts_and_repeat_with_the_seed() -> None:
    both = load(requests=200, isl=12, isl_distribution=Lengths(min=2),
                osl_distribution=Lengths(min=2))  # fmt: skip
    answers = both.output_lengths(5)
    assert set(answers) == set(range(2, 13))
    assert answers == both.output_lengths(5) != both.output_lengths(6)
    assert [len(prompt) for prompt in both.request_prompts(9, 5)] != list(answers)
    assert load(seed=5, requests=200, osl_distribution=Lengths(min=2)).output_lengths(1) == answers
    assert both.mean_osl(5) == pytest.approx(np.mean(answers))
    prompts = [len(prompt) for prompt in both.request_prompts(9, 5)]
    assert both.mean_isl(5) == pytest.approx(np.mean(prompts))
    assert load(requests=4).output_lengths(0) == (12,) * 4
    assert (load().mean_isl(0), load().mean_osl(0)) == (8.0, 12.0)


def test_each_wave_has_the_lengths_of_its_own_requests() -> None:
    workload = load(requests=6, osl_distribution=Lengths(min=1))
    waves = workload.waves(workload.request_prompts(9, 3), 3)
    told = [options.osl_each for _, options in waves if options is not None]
    assert sum(told, ()) == workload.output_lengths(3)
    assert [len(prompts) for prompts, _ in waves] == [2, 2, 2]
    assert [options for _, options in load(requests=4).waves(((1,),) * 4, 0)] == [None, None]


def test_end_of_sequence_makes_a_run_shorter_and_says_so(tmp_path: Path) -> None:
    graph = write_graph(tiny_model(tmp_path / "model"), tmp_path / "graph", context=48)
    session = graph_session(open_graph(graph))
    workload = load(ignore_eos=False)
    prompts = workload.request_prompts(VOCAB_SIZE, 0)
    full = session.generate(prompts, 12).tokens
    ends = frozenset({int(full[0, 3])})
    samples = speed_of(
        workload, {"engine": session}, vocab_size=VOCAB_SIZE, repeats=1, seed=0, eos_token_ids=ends
    )
    (run,) = samples["engine"]
    assert run.output_lengths[0] <= 4
    assert run.output_tokens == sum(run.output_lengths) < 24
    assert summarize(workload, samples["engine"])["mean_osl"] == (run.output_tokens or 0) / 2


def ragged(*lengths: int, last: int = 7) -> Generation:
    tokens = np.full((len(lengths), max(lengths)), UNUSED_TOKEN, np.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = last
    return Generation(tokens=tokens, ttft_s=0.1, total_s=2.0, lengths=lengths)


def sample(made: Generation, options: BatchOptions) -> SpeedSample:
    return SpeedSample.of_waves([made], [(PROMPTS, options)], 9)


def test_answer_that_is_short_without_an_end_is_no_measurement() -> None:
    asked = BatchOptions(osl_each=(4, 1, 7))
    assert sample(ragged(4, 1, 7), asked).output_tokens_per_s == 12 / 2.0
    for wrong in (ragged(4, 1, 6), ragged(4, 2, 7), ragged(4, 1), ragged(4, 1, 7, 7)):
        with pytest.raises(PipelineError, match="its speed cannot be measured"):
            sample(wrong, asked)
    ended = BatchOptions(osl_each=(4, 1, 7), eos_token_ids=frozenset({7}))
    assert sample(ragged(4, 1, 6), ended).output_tokens == 11
    for wrong in (ragged(4, 1, 6, last=8), ragged(5, 1, 7), ragged(4, 0, 7)):
        with pytest.raises(PipelineError, match="its speed cannot be measured"):
            sample(wrong, ended)
