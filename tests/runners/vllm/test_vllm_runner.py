"""Runner vLLM: what it says in advance; times, arrivals and faults of single requests."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.gpu import conditions_of
from pipeline.core.values import Engine, Limits
from pipeline.runners.child import ChildSession
from pipeline.runners.runner import Generation
from pipeline.runners.vllm import VllmRunner
from pipeline.runners.workload import BatchOptions
from tests.acceptance.test_conditions import nvml
from tests.runners.toy_model import continued

PACKAGES = Path(__file__).parent / "fake_packages"
VOCAB = 320
SERVE_ARGS = ("--max-model-len", "2048", "--max-num-seqs", "4", "--kv-cache-dtype", "fp8")
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 7, 7], [8, 1]]

RUNNER = VllmRunner(
    gpu_memory_utilization=0.5, arguments=(), load_timeout_s=60.0, answer_timeout_s=60.0
)
ENGINE = Engine(
    dir=Path("/engine"),
    digest="0" * 64,
    format="checkpoint",
    variant="any-checkpoint-fp8",
    runtime=("vllm", "0.24.0"),
    sms=(),
    limits=Limits(max_batch_size=4, max_seq_len=128, max_num_tokens=256, kv_cache_dtype="fp8"),
    min_vram_bytes=0,
    serve_args=("--kv-cache-dtype", "fp8"),
)

pytestmark = pytest.mark.usefixtures("temporary")


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vLLM that stands in."""
    monkeypatch.setenv("PYTHONPATH", str(PACKAGES))
    monkeypatch.setenv("FAKE_VLLM", "")
    monkeypatch.setenv("FAKE_VLLM_STEP_S", "0.002")


@contextlib.contextmanager
def session(
    behaviour: str = "", *, answer_s: float = 30.0, arguments: tuple[str, ...] = ()
) -> Iterator[ChildSession]:
    os.environ["FAKE_VLLM"] = behaviour  # set back by the fixture
    runner = dataclasses.replace(RUNNER, arguments=arguments, answer_timeout_s=answer_s)
    with runner.open_folder(Path("/model"), SERVE_ARGS) as opened:
        yield opened


def rows(made: Generation) -> list[list[int]]:
    pairs = zip(made.tokens.tolist(), made.output_lengths, strict=True)
    return [row[:length] for row, length in pairs]


def test_a_generation_has_the_times_of_its_requests() -> None:
    with session() as opened:
        made = opened.generate([[1, 2, 3], [4, 5, 6]], 5)
        (single,) = opened.generate([[1]], 1).requests
    (timing, other) = made.requests
    assert timing == other
    assert timing.ttft_ms == pytest.approx(20.0)
    assert timing.request_latency_ms == pytest.approx(420.0)
    assert timing.itl_ms == pytest.approx(100.0)
    assert timing.arrival_s is None
    assert made.ttft_s == pytest.approx(0.02)
    assert single.itl_ms is None  # one token has no gap


def test_requests_are_served_as_they_arrive_and_times_count_from_there() -> None:
    arrivals = (0.0, 0.05, 0.3, 0.3, 1.0)
    options = BatchOptions(osl_each=(4, 9, 2, 3, 5), arrivals_s=arrivals)
    with session(answer_s=0.9) as opened:  # which does not run while requests still arrive
        made = opened.generate(PROMPTS, 9, options)
        again = opened.generate(PROMPTS, 9, options)
    wanted = [continued(p, n, VOCAB) for p, n in zip(PROMPTS, options.osl_each, strict=True)]
    assert rows(made) == rows(again) == wanted
    assert [request.arrival_s for request in made.requests] == list(arrivals)
    # The last cannot end before it arrives; its own time does not begin with the first's.
    assert made.total_s > 1.0
    assert made.requests[4].request_latency_ms < 1000


def test_waiting_for_others_is_in_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM_STEP_S", "0.02")
    together = BatchOptions(osl_each=(10,) * 5, arrivals_s=(0.0,) * 5)
    one_by_one = BatchOptions(osl_each=(10,) * 5, arrivals_s=(0.0,) * 5, max_concurrency=1)
    with session() as opened:
        one = opened.generate(PROMPTS, 10, one_by_one)
        free = opened.generate(PROMPTS, 10, together)
    # One after the other, 10 steps of 0.02 s each; SERVE_ARGS let vLLM run four at once.
    ttft = [request.ttft_ms for request in one.requests]
    assert ttft == sorted(ttft)
    assert ttft[4] > 4 * 10 * 20
    assert free.requests[3].ttft_ms < ttft[3]
    assert free.requests[4].ttft_ms > 10 * 20
    assert rows(one) == rows(free)


def test_request_that_vllm_refuses_takes_the_others_with_it() -> None:
    options = BatchOptions(osl_each=(400,) * 5, arrivals_s=(0.0,) * 5)
    with session("raise-serve") as opened:
        with pytest.raises(PipelineError, match="ValueError: longer than the context"):
            opened.generate(PROMPTS, 400, options)
        assert opened.generate([[1]], 2).tokens.tolist() == [continued([1], 2, VOCAB)]


def test_logits_that_vllm_calls_corrupted_are_an_error() -> None:
    with pytest.raises(CorruptError, match="not a number"), session("corrupted") as opened:
        opened.generate([[1]], 4)


def test_without_statistics_there_are_no_times_to_report() -> None:
    with (
        pytest.raises(PipelineError, match="remove --disable-log-stats"),
        session(arguments=("--disable-log-stats",)) as opened,
    ):
        opened.generate([[1]], 4)


def test_a_missing_package_names_the_version_to_install() -> None:
    reason = RUNNER.why_not(ENGINE)
    assert reason is not None
    assert "pip install vllm==0.24.0" in reason


W4A16 = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize(
    ("declared", "sm", "reason"),
    [
        ({"quant_algo": "FP8"}, 86, "executes FP8 from SM 89 on, .* has SM 86; use a newer card"),
        ({"quant_algo": "FP8"}, 89, "^$"),
        (W4A16, 86, "^$"),
        (W4A16, 75, "executes W4A16 from SM 80 on, .* has SM 75"),
    ],
)
def test_a_missing_or_too_old_card_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, declared: object, sm: int, reason: str
) -> None:
    monkeypatch.syspath_prepend(str(PACKAGES))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "needs a CUDA device" in (RUNNER.why_not(ENGINE) or "")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": declared}))
    card = conditions_of(nvml(DeviceGetCudaComputeCapability=divmod(sm, 10)), 0)
    monkeypatch.setattr("pipeline.runners.vllm.read_conditions", lambda: card)
    engine = dataclasses.replace(ENGINE, dir=tmp_path)
    assert re.search(reason, RUNNER.why_not(engine) or "")


def test_the_packages_own_arguments_are_kept_and_the_users_come_last() -> None:
    runner = dataclasses.replace(RUNNER, arguments=("--kv-cache-dtype", "auto"))
    arguments = runner.engine_arguments(Path("/engine"), ENGINE.serve_args)
    assert arguments[:4] == ("--model", "/engine", "--kv-cache-dtype", "fp8")
    assert arguments[-2:] == ("--kv-cache-dtype", "auto")
