"""Runner vLLM on a CUDA device: a small random model, against the simulation of its checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.acceptance.card import condition_findings, device_samples
from pipeline.acceptance.quality import log_softmax
from pipeline.acceptance.speed import achieved_rate, latency_percentiles
from pipeline.core.cache import StageCache
from pipeline.core.gpu import Conditions, read_conditions
from pipeline.core.values import Engine
from pipeline.formats.checkpoint.compiler import CheckpointCompiler
from pipeline.model.hf import write_random_model
from pipeline.quant.fp8 import Fp8Quantizer
from pipeline.quant.simulate import load_simulation
from pipeline.quant.w4a16 import W4a16Quantizer
from pipeline.runners.child import ChildSession
from pipeline.runners.vllm import VllmRunner
from pipeline.runners.workload import BatchOptions, Workload
from pipeline.sources.text.corpus import Calibration
from tests.quant.tiny_quantized import ADA, RepeatedText, local_weights
from tests.specs import tiny_spec
from tests.tiny import TEXT

pytestmark = pytest.mark.gpu

SHAPE = tiny_spec(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    vocab_size=512,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
RUNNER = VllmRunner(
    gpu_memory_utilization=0.3,
    arguments=("--enforce-eager",),
    load_timeout_s=240.0,
    answer_timeout_s=120.0,
)
KINDS: dict[str, Fp8Quantizer | W4a16Quantizer] = {
    "bfloat16": Fp8Quantizer(device="cpu"),
    "fp8": Fp8Quantizer(device="cpu"),
    "w4a16": W4a16Quantizer(device="cpu"),
}
MAX_KL_NATS = {"bfloat16": 0.01, "fp8": 0.02, "w4a16": 0.01}
MIN_TOP1 = {"bfloat16": 0.85, "fp8": 0.8, "w4a16": 0.85}
SLACK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Run:
    kind: str
    session: ChildSession
    engine: Engine
    before: Conditions


def engine_of(folder: Path, kind: str) -> Engine:
    kv_cache_dtype: Literal["bfloat16", "fp8"] = "fp8" if kind == "fp8" else "bfloat16"
    (folder / "model").mkdir(parents=True)
    write_random_model(SHAPE, folder / "model", documents=[TEXT], seed=3)
    weights, cache = local_weights(folder / "model"), StageCache(root=folder / "cache")
    calibration = Calibration(text=RepeatedText(), calib_size=4, seq_len=64, batch_size=4, seed=1)
    checkpoint = KINDS[kind].quantize(weights, calibration, cache)
    compiler = CheckpointCompiler(
        max_batch_size=8,
        max_seq_len=256,
        max_num_tokens=1024,
        kv_cache_dtype=kv_cache_dtype,
        runtime="vllm",
        runtime_version="0.24.0",
    )
    return compiler.compile(checkpoint, ADA, cache, folder / "logs")


def conditions() -> Conditions:
    found = read_conditions()
    assert found is not None, "make test-gpu needs a CUDA device"
    return found


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One load for all tests; when it is closed, the memory must be free again."""
    kind = request.param
    engine = engine_of(tmp_path_factory.mktemp(kind), kind)
    before = conditions()
    print(before)
    assert RUNNER.why_not(engine) is None
    with RUNNER.open_folder(engine.dir, engine.serve_args) as session:
        yield Run(kind=kind, session=session, engine=engine, before=before)
        assert before.memory_used_bytes is not None
        assert (conditions().memory_used_bytes or 0) > before.memory_used_bytes + SLACK_BYTES
    deadline = time.monotonic() + 10.0
    while (used := conditions().memory_used_bytes or 0) > before.memory_used_bytes + SLACK_BYTES:
        assert time.monotonic() < deadline, (
            f"{used} bytes in use, {before.memory_used_bytes} before"
        )
        time.sleep(0.2)
    findings = list(condition_findings(before, conditions()))
    assert [finding for finding in findings if finding.kind != "note"] == []
    print("used before, after", before.memory_used_bytes, used, findings)


def windows() -> list[list[int]]:
    drawn = np.random.default_rng(5).integers(3, SHAPE.vocab_size, (4, 96))
    return [[int(token) for token in row] for row in drawn]


def kl_and_top1(
    ours: list[NDArray[np.float32]], theirs: list[NDArray[np.float32]]
) -> tuple[float, float]:
    p, q = (log_softmax(np.concatenate(rows)) for rows in (ours, theirs))
    kl, agree = (np.exp(p) * (p - q)).sum(axis=-1), p.argmax(axis=-1) == q.argmax(axis=-1)
    return float(kl.mean()), float(agree.mean())


def simulated(engine_dir: Path, broken_layer: int | None = None) -> list[NDArray[np.float32]]:
    import torch

    model = load_simulation(engine_dir)
    if broken_layer is not None:
        linear = model.model.layers[broken_layer].mlp.down_proj
        forward = linear.forward
        linear.forward = lambda x: 4.0 * forward(x)
    with torch.inference_mode():
        return [model(torch.tensor([tokens])).logits[0].numpy() for tokens in windows()]


def test_logits_are_those_of_the_simulated_checkpoint(run: Run) -> None:
    got = [run.session.logits(tokens) for tokens in windows()]
    assert all(values.shape == (96, SHAPE.vocab_size) for values in got)
    assert np.exp(got[0]).sum(axis=-1) == pytest.approx(1.0, abs=1e-3)
    kl, top1 = kl_and_top1(simulated(run.engine.dir), got)
    broken_kl, broken_top1 = kl_and_top1(simulated(run.engine.dir, 1), got)
    print(f"{run.kind}: KL {kl:.6f} top-1 {top1:.4f}")
    print(f"{run.kind}: one layer x 4: KL {broken_kl:.6f} top-1 {broken_top1:.4f}")
    assert kl <= MAX_KL_NATS[run.kind] < broken_kl
    assert top1 >= MIN_TOP1[run.kind] > broken_top1


def test_generation_and_stream_go_on_from_the_logits(run: Run) -> None:
    session, prompt = run.session, windows()[0]
    alone = session.generate([prompt], 24).tokens[0].tolist()
    assert alone[0] == int(session.logits(prompt)[-1].argmax())
    assert list(session.stream(prompt, 24, frozenset())) == alone
    stop = alone[5]
    assert list(session.stream(prompt, 24, frozenset({stop}))) == alone[: alone.index(stop)]
    stream = session.stream(prompt, 100, frozenset())
    assert next(stream) == alone[0]
    stream.close()  # type: ignore[attr-defined]
    assert session.generate([prompt], 3).tokens[0].tolist() == alone[:3]


def test_every_request_gets_its_tokens_and_its_times(run: Run) -> None:
    prompts = [row[: 40 + 8 * index] for index, row in enumerate(windows())]
    run.session.generate(prompts, 8)
    with device_samples() as samples:
        generation = run.session.generate(prompts, 128)
    print(conditions())
    print(
        f"{generation.output_tokens / generation.total_s:.0f} tok/s",
        latency_percentiles(generation.requests),
    )
    print(f"{samples.seconds:.2f} s, {len(samples.readings)} readings, {samples.energy_j} J")
    assert generation.tokens.shape == (4, 128)
    for request in generation.requests:
        assert request.itl_ms is not None
        assert 0 < request.ttft_ms < request.request_latency_ms
        assert request.request_latency_ms <= 1e3 * generation.total_s + 50
        rest = request.request_latency_ms - request.ttft_ms
        assert request.itl_ms * 127 == pytest.approx(rest)
    assert 0 < generation.ttft_s < generation.total_s
    assert (samples.peak_memory_bytes or 0) > (run.before.memory_used_bytes or 0)
    assert (samples.energy_j or 0) > 0


def test_each_request_ends_at_its_own_length_or_at_an_end_of_sequence_id(run: Run) -> None:
    prompts = windows()
    alone = run.session.generate(prompts[:1], 12).tokens[0].tolist()
    each = (3, 12, 1, 7)
    made = run.session.generate(prompts, 12, BatchOptions(osl_each=each))
    assert made.output_lengths == each
    ends = frozenset({alone[4]})
    options = BatchOptions(osl_each=(12,), eos_token_ids=ends)
    ended = run.session.generate(prompts[:1], 12, options)
    assert ended.tokens[0].tolist() == alone[: alone.index(alone[4]) + 1]
    assert run.session.generate(prompts[:1], 12).output_lengths == (12,)


def test_requests_that_arrive_are_timed_from_their_arrival(run: Run) -> None:
    """Slow arrivals are kept up with; all at once, one at a time, they wait for each other."""
    prompts = windows() * 4
    load = Workload(name="r", batch=8, isl=96, osl=16, request_rate=8.0, requests=16)
    arrivals = load.arrivals_s(0)
    slow = run.session.generate(prompts, 16, BatchOptions(osl_each=(16,) * 16, arrivals_s=arrivals))
    assert slow.output_lengths == (16,) * 16
    assert [request.arrival_s for request in slow.requests] == list(arrivals)
    assert slow.total_s > arrivals[-1]
    rate = achieved_rate(slow.requests)
    print(f"asked 8.0, achieved {rate}", latency_percentiles(slow.requests))
    assert rate is not None
    assert rate > 0.9 * 8.0
    one_by_one = BatchOptions(osl_each=(16,) * 16, arrivals_s=(0.0,) * 16, max_concurrency=1)
    queued = run.session.generate(prompts, 16, one_by_one)
    ttft = [request.ttft_ms for request in queued.requests]
    assert ttft == sorted(ttft)
    assert ttft[-1] > 10 * ttft[0]
