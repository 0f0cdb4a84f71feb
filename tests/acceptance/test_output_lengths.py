"""Answers that differ in length: drawn, or ended by end-of-sequence; on real sessions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.acceptance.speed import SpeedSample, summarize
from pipeline.core.errors import PipelineError
from pipeline.model.hf import load_model
from pipeline.runners.onnxruntime import graph_session
from pipeline.runners.runner import UNUSED_TOKEN, Generation, Session
from pipeline.runners.transformers import TransformersSession
from pipeline.runners.workload import BatchOptions, Lengths, Workload
from tests.acceptance.questions import speed_of
from tests.formats.decoder.decoders import open_graph, write_graph
from tests.tiny import VOCAB_SIZE, tiny_model

PROMPTS = [[1, 2, 3, 4], [9, 8, 7, 6], [5, 5, 5, 5]]


def load(**changes: Any) -> Workload:
    return Workload(**{"name": "b2", "batch": 2, "isl": 8, "osl": 12, **changes})


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Session]:
    folder = tiny_model(tmp_path_factory.mktemp("model"))
    graph = open_graph(write_graph(folder, tmp_path_factory.mktemp("graph"), context=48))
    return {
        "onnxruntime": graph_session(graph),
        "transformers": TransformersSession(load_model(folder, "float32")),
    }


RUNTIMES = pytest.mark.parametrize("runtime", ["onnxruntime", "transformers"])


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


@RUNTIMES
def test_row_ends_at_its_own_length_and_the_batch_at_its_longest(
    sessions: dict[str, Session], runtime: str
) -> None:
    session = sessions[runtime]
    full = session.generate(PROMPTS, 9).tokens
    made = session.generate(PROMPTS, 9, BatchOptions(osl_each=(4, 1, 7)))
    assert made.lengths == made.output_lengths == (4, 1, 7)
    assert made.output_tokens == 12
    assert made.tokens.shape == (3, 7)  # nothing is computed after the last row has ended
    for row, (length, whole) in enumerate(zip(made.lengths, full, strict=True)):
        assert made.tokens[row, :length].tolist() == whole[:length].tolist()
        assert set(made.tokens[row, length:].tolist()) <= {UNUSED_TOKEN}


@RUNTIMES
def test_any_end_of_sequence_id_ends_a_row_and_counts(
    sessions: dict[str, Session], runtime: str
) -> None:
    session = sessions[runtime]
    full = session.generate(PROMPTS, 9).tokens.tolist()
    ends = frozenset({full[0][2], full[2][5]})
    wanted = [next((at + 1 for at, t in enumerate(row) if t in ends), 9) for row in full]
    assert min(wanted) < 9
    made = session.generate(PROMPTS, 9, BatchOptions(osl_each=(9, 9, 9), eos_token_ids=ends))
    assert list(made.output_lengths) == wanted
    assert made.tokens[0, wanted[0] - 1] in ends


def test_end_of_sequence_makes_a_run_shorter_and_says_so(sessions: dict[str, Session]) -> None:
    session = sessions["onnxruntime"]
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
