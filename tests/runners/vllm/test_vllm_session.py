"""Tokens, log-probabilities and faults of a model that another process holds."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.acceptance.speed import SpeedSample
from pipeline.core.errors import CorruptError, PipelineError, ToolError
from pipeline.runners.vllm import child
from pipeline.runners.vllm.runner import VllmRunner
from pipeline.runners.vllm.session import VllmSession, engine_arguments
from pipeline.runners.vllm.timing import RequestTiming, latency_percentiles

PACKAGES = Path(__file__).parent / "fake_packages"
VOCAB = 320
SERVE_ARGS = ("--max-model-len", "128", "--max-num-seqs", "4", "--kv-cache-dtype", "fp8")


def next_token(prompt: list[int]) -> int:
    """As the fake vLLM computes it."""
    return (7 * sum(prompt) + len(prompt)) % VOCAB


def continued(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The fake vLLM, and a temporary folder of the test's own, to see what stays in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("PYTHONPATH", str(PACKAGES))
    monkeypatch.setenv("FAKE_VLLM", "")
    yield folder
    tempfile.tempdir = None


@contextlib.contextmanager
def session(
    behaviour: str = "", *, answer_s: float = 30.0, arguments: tuple[str, ...] = ()
) -> Iterator[VllmSession]:
    os.environ["FAKE_VLLM"] = behaviour  # set back by the fixture
    runner = VllmRunner(
        gpu_memory_utilization=0.5,
        arguments=arguments,
        load_timeout_s=answer_s,
        answer_timeout_s=answer_s,
    )
    with runner.open_folder(Path("/model"), SERVE_ARGS) as opened:
        yield opened


def test_log_probabilities_of_a_position_are_those_after_its_prefix(temporary: Path) -> None:
    tokens = [5, 3, 200, 7, 7]
    with session() as opened:
        logits = opened.logits(tokens)
    assert logits.shape == (5, VOCAB)
    assert logits.dtype == np.float32
    best = [next_token(tokens[: end + 1]) for end in range(5)]
    for row, token in zip(logits, best, strict=True):
        assert row.tolist() == [-0.25 * ((other - token) % VOCAB) for other in range(VOCAB)]
    assert list(temporary.iterdir()) == []


def test_generated_tokens_are_continuations_of_ragged_prompts() -> None:
    prompts = [[1, 2, 3], [4], [5, 6]]
    with session() as opened:
        generation = opened.generate(prompts, 6)
    assert generation.tokens.tolist() == [continued(prompt, 6) for prompt in prompts]
    assert generation.total_s > 0
    assert generation.requests == (generation.requests[0],) * 3


def test_a_generation_has_the_figures_of_its_requests() -> None:
    with session() as opened:
        generation = opened.generate([[1, 2, 3], [4, 5, 6]], 5)
    (timing, _) = generation.requests
    assert timing.ttft_ms == pytest.approx(20.0)
    assert timing.request_latency_ms == pytest.approx(420.0)
    assert timing.itl_ms == pytest.approx(100.0)
    assert generation.ttft_s == pytest.approx(0.02)
    assert generation.output_tokens_per_s == pytest.approx(10 / generation.total_s)
    assert generation.total_tokens_per_s(3) == pytest.approx(16 / generation.total_s)
    assert SpeedSample.of(generation).output_tokens_per_s == generation.output_tokens_per_s


def test_percentiles_are_over_requests_and_one_token_has_no_gap() -> None:
    requests = [
        RequestTiming(ttft_ms=float(n), request_latency_ms=10.0 * n, itl_ms=None)
        for n in range(101)
    ]
    figures = latency_percentiles(requests)
    assert figures["ttft_ms"] == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert figures["request_latency_ms"]["p90"] == 900.0
    assert "itl_ms" not in figures
    one = {
        "first_token_latency": 0.5,
        "first_token_ts": 7.0,
        "last_token_ts": 7.0,
        "num_generation_tokens": 1,
    }
    assert RequestTiming.of(one) == RequestTiming(
        ttft_ms=500.0, request_latency_ms=500.0, itl_ms=None
    )


def test_stream_ends_before_an_end_of_sequence_token() -> None:
    wanted = continued([9, 9], 8)
    with session() as opened:
        assert list(opened.stream([9, 9], 8, frozenset())) == wanted
        assert list(opened.stream([9, 9], 8, frozenset({wanted[4]}))) == wanted[:4]


def test_a_stream_that_is_left_early_does_not_disturb_what_follows() -> None:
    with session() as opened:
        stream = opened.stream([9, 9], 10_000, frozenset())
        assert [next(stream) for _ in range(3)] == continued([9, 9], 3)
        stream.close()  # type: ignore[attr-defined]
        assert opened.generate([[1]], 2).tokens.tolist() == [continued([1], 2)]
        assert list(opened.stream([2], 3, frozenset())) == continued([2], 3)


def use(where: str, behaviour: str, answer_s: float = 30.0) -> None:
    with session(behaviour, answer_s=answer_s) as opened:
        if where == "stream":
            list(opened.stream([1], 5, frozenset()))
        opened.generate([[1]], 2)


@pytest.mark.parametrize("where", ["load", "generate", "stream"])
def test_a_crash_is_an_error_with_the_end_of_the_log(where: str, temporary: Path) -> None:
    with pytest.raises(ToolError, match="no more memory") as caught:
        use(where, f"crash-{where}")
    assert caught.value.returncode == 17
    assert list(temporary.iterdir()) == [caught.value.log_path]


@pytest.mark.parametrize("where", ["load", "generate", "stream"])
def test_a_hang_is_an_error_that_names_the_setting(where: str) -> None:
    started = time.monotonic()
    with pytest.raises(ToolError, match=r"raise runner\.(load|answer)_timeout_s") as caught:
        use(where, f"hang-{where}", answer_s=1.5)
    assert time.monotonic() - started < 15
    assert caught.value.returncode == -signal.SIGKILL


def test_values_that_are_not_finite_are_never_logits() -> None:
    with pytest.raises(CorruptError, match="not finite at 3 of 3 positions"), session("nan") as s:
        s.logits([1, 2, 3])


def test_too_few_rows_are_an_error() -> None:
    with pytest.raises(PipelineError, match="3 positions, got 2"), session("rows") as opened:
        opened.logits([1, 2, 3])


def test_too_few_tokens_are_an_error() -> None:
    with (
        pytest.raises(PipelineError, match="2 requests of 4 tokens each, got 2 of 3"),
        session("short") as opened,
    ):
        opened.generate([[1], [2]], 4)


def test_logits_that_vllm_calls_corrupted_are_an_error() -> None:
    with pytest.raises(CorruptError, match="not a number"), session("corrupted") as opened:
        opened.generate([[1]], 4)


def test_a_refused_request_is_an_error_and_the_next_one_works() -> None:
    with session("raise-generate") as opened:
        with pytest.raises(PipelineError, match="ValueError: longer than the context"):
            opened.generate([[1]], 4)
        assert list(opened.stream([2], 3, frozenset())) == continued([2], 3)


def test_without_statistics_there_are_no_times_to_report() -> None:
    with (
        pytest.raises(PipelineError, match="remove --disable-log-stats"),
        session(arguments=("--disable-log-stats",)) as opened,
    ):
        opened.generate([[1]], 4)


def test_an_argument_that_vllm_does_not_know_is_an_error_with_its_words() -> None:
    with (
        pytest.raises(ToolError, match="unrecognized arguments: --no-such-thing"),
        session(arguments=("--no-such-thing",)),
    ):
        pass


def test_nothing_stays_after_an_error_of_the_caller(temporary: Path) -> None:
    with pytest.raises(ZeroDivisionError), session() as opened:
        1 / len(opened.generate([[1]], 1).tokens[1:])
    assert list(temporary.iterdir()) == []


def test_the_process_and_what_it_started_end_when_the_caller_is_gone() -> None:
    """A caller that was killed cannot end anything: the child has to notice."""
    process = subprocess.Popen(
        [sys.executable, "-P", str(child.__file__), *engine_arguments(Path("/model"), (), ())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert b"ready" in process.stdout.readline()
    process.stdin.close()
    assert process.wait(10) == -signal.SIGKILL
    process.stdout.close()
