"""What runner vLLM says in advance, and what it starts vLLM with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.core.gpu import conditions_of
from pipeline.core.values import Engine, Limits
from pipeline.runners.vllm import VllmRunner
from tests.acceptance.test_conditions import nvml

RUNNER = VllmRunner(
    gpu_memory_utilization=0.5, arguments=(), load_timeout_s=30.0, answer_timeout_s=30.0
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


def test_a_missing_package_names_the_version_to_install() -> None:
    reason = RUNNER.why_not(ENGINE)
    assert reason is not None
    assert "pip install vllm==0.24.0" in reason


def test_a_missing_or_too_old_card_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fake_packages"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "needs a CUDA device" in (RUNNER.why_not(ENGINE) or "")
    for capability, runs in (((8, 6), False), ((8, 9), True)):
        card = conditions_of(nvml(DeviceGetCudaComputeCapability=capability), 0)
        monkeypatch.setattr("pipeline.runners.vllm.read_conditions", lambda card=card: card)
        reason = RUNNER.why_not(ENGINE)
        assert (reason is None) == runs
        assert reason is None or "has SM 86; use a newer card" in reason


def test_the_packages_own_arguments_are_kept_and_the_users_come_last() -> None:
    runner = dataclasses.replace(RUNNER, arguments=("--kv-cache-dtype", "auto"))
    arguments = runner.engine_arguments(Path("/engine"), ENGINE.serve_args)
    assert arguments[:4] == ("--model", "/engine", "--kv-cache-dtype", "fp8")
    assert arguments[-2:] == ("--kv-cache-dtype", "auto")
