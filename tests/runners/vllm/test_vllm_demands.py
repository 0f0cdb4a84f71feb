"""Lengths, ends and arrivals of single requests, in the process that holds vLLM."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.acceptance.speed import measure_speed, summarize
from pipeline.core.errors import PipelineError, ToolError
from pipeline.runners.session import UNUSED_TOKEN, Demands
from pipeline.runners.vllm.runner import VllmRunner
from pipeline.runners.vllm.session import VllmSession
from pipeline.runners.workload import Workload
from tests.runners.vllm.test_vllm_session import PACKAGES, SERVE_ARGS, VOCAB, continued

PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 7, 7], [8, 1]]


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The vLLM that stands in."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("PYTHONPATH", str(PACKAGES))
    monkeypatch.setenv("FAKE_VLLM", "")
    monkeypatch.setenv("FAKE_VLLM_STEP_S", "0.002")
    yield
    tempfile.tempdir = None


@contextlib.contextmanager
def session(behaviour: str = "", answer_s: float = 30.0) -> Iterator[VllmSession]:
    os.environ["FAKE_VLLM"] = behaviour  # set back by the fixture
    runner = VllmRunner(
        gpu_memory_utilization=0.5,
        arguments=(),
        load_timeout_s=30.0,
        answer_timeout_s=answer_s,
    )
    with runner.open_folder(Path("/model"), SERVE_ARGS) as opened:
        yield opened


def rows(tokens: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> list[list[int]]:
    return [[token for token in row if token != UNUSED_TOKEN] for row in tokens.tolist()]


def test_each_request_gets_its_own_number_of_tokens() -> None:
    each = (3, 1, 6, 2, 5)
    with session() as opened:
        made = opened.generate(PROMPTS, 6, Demands(osl_each=each))
    assert made.output_lengths == each
    assert rows(made.tokens) == [continued(p, n) for p, n in zip(PROMPTS, each, strict=True)]
    assert made.output_tokens_per_s == pytest.approx(17 / made.total_s)


def test_any_end_of_sequence_id_ends_an_answer_and_counts() -> None:
    full = [continued(prompt, 8) for prompt in PROMPTS]
    ends = frozenset({full[0][2], full[3][5]})
    wanted = [row[: next((at + 1 for at, t in enumerate(row) if t in ends), 8)] for row in full]
    demands = Demands(osl_each=(8,) * 5, eos_token_ids=ends)
    with session() as opened:
        made = opened.generate(PROMPTS, 8, demands)
        assert opened.generate(PROMPTS, 8).tokens.tolist() == full  # ignored again
    assert rows(made.tokens) == wanted
    assert made.lengths == tuple(map(len, wanted))
    assert [request.arrival_s for request in made.requests] == [None] * 5


def test_requests_are_served_as_they_arrive_and_times_count_from_there() -> None:
    arrivals = (0.0, 0.05, 0.3, 0.3, 2.0)
    demands = Demands(osl_each=(4, 9, 2, 3, 5), arrivals_s=arrivals)
    with session() as opened:
        made = opened.generate(PROMPTS, 9, demands)
        again = opened.generate(PROMPTS, 9, demands)
    wanted = [continued(p, n) for p, n in zip(PROMPTS, demands.osl_each, strict=True)]
    assert rows(made.tokens) == rows(again.tokens) == wanted
    assert [request.arrival_s for request in made.requests] == list(arrivals)
    # The last cannot end before it arrives; its own time does not begin with the first's.
    assert made.total_s > 2.0
    assert made.requests[4].request_latency_ms < 2000


def test_waiting_for_others_is_in_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM_STEP_S", "0.02")
    each = (10,) * 5
    with session() as opened:
        one = opened.generate(
            PROMPTS, 10, Demands(osl_each=each, arrivals_s=(0.0,) * 5, max_concurrency=1)
        )
        free = opened.generate(PROMPTS, 10, Demands(osl_each=each, arrivals_s=(0.0,) * 5))
    # One after the other, 10 steps of 0.02 s each; SERVE_ARGS let vLLM run four at once.
    ttft = [request.ttft_ms for request in one.requests]
    assert ttft == sorted(ttft)
    assert ttft[4] > 4 * 10 * 20
    assert one.total_s > 5 * 10 * 0.02
    assert free.requests[3].ttft_ms < ttft[3]
    assert free.requests[4].ttft_ms > 10 * 20
    assert rows(one.tokens) == rows(free.tokens)


def test_answer_timeout_does_not_run_while_requests_still_arrive() -> None:
    demands = Demands(osl_each=(2, 2), arrivals_s=(0.0, 2.5))
    with session(answer_s=2.0) as opened:
        assert opened.generate(PROMPTS[:2], 2, demands).total_s > 2.5


def test_request_that_vllm_refuses_takes_the_others_with_it() -> None:
    demands = Demands(osl_each=(400,) * 5, arrivals_s=(0.0,) * 5)
    with session("raise-serve") as opened:
        with pytest.raises(PipelineError, match="ValueError: longer than the context"):
            opened.generate(PROMPTS, 400, demands)
        assert opened.generate([[1]], 2).tokens.tolist() == [continued([1], 2)]


def test_crash_while_serving_is_an_error_with_the_end_of_the_log() -> None:
    demands = Demands(osl_each=(4,) * 5, arrivals_s=(0.0,) * 5)
    with pytest.raises(ToolError, match="no more memory"), session("crash-serve") as opened:
        opened.generate(PROMPTS, 4, demands)


def test_too_few_tokens_without_an_end_are_an_error() -> None:
    with (
        pytest.raises(PipelineError, match="2 requests of 2 to 4 tokens, got 2 of 1 or 3"),
        session("short") as opened,
    ):
        opened.generate([[1], [2]], 4, Demands(osl_each=(4, 2)))


def test_open_loop_on_a_server_that_is_too_slow_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once, eight steps of 0.005 s each: at most 50 requests a second."""
    monkeypatch.setenv("FAKE_VLLM_STEP_S", "0.005")

    def run(rate: float) -> float:
        load = Workload(name="r", batch=2, isl=4, osl=8, request_rate=rate, requests=24)
        with session() as opened:
            samples = measure_speed(load, {"engine": opened}, vocab_size=VOCAB, repeats=1, seed=0)
        entry = summarize(load, samples)
        assert entry["output_tokens_per_s"] > 0
        return float(entry["request_rate"]["achieved"])

    too_fast = run(160.0)
    assert too_fast < 64.0
    assert run(16.0) / 16.0 > too_fast / 160.0
