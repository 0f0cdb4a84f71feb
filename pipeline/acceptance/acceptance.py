"""Acceptance: runs what can be run here, measures it, and says what was not run.

The engine of a card that is not in this machine cannot run; the same graph on another runtime can.
That is why the best verdict here is `checked`.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from importlib.metadata import version
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.acceptance.cut import compare_cut
from pipeline.acceptance.judge import QualityLimits, judge
from pipeline.acceptance.quality import engine_figures, source_figures, summarize_quality
from pipeline.acceptance.speed import measure_speed, summarize
from pipeline.acceptance.workload import Workload
from pipeline.cache import StageCache, source_digest
from pipeline.errors import Fault, RecipeError
from pipeline.hardware import Target
from pipeline.hf import load_tokenizer
from pipeline.runners.session import Runner, Session
from pipeline.settings import STRICT, Listed
from pipeline.shapes import ModelShape
from pipeline.stages import Checkpoint, Engine, Report, Verdict, digest_of
from pipeline.text.corpus import TextCorpus, require_disjoint, text_digest
from pipeline.text.windows import pack_windows

log = logging.getLogger(__name__)

_CODE = ("pipeline.acceptance", "pipeline.runners", "pipeline.text.windows")
_TOOLS = ("onnxruntime", "torch", "transformers")
_SIMULATIONS = frozenset({"transformers"})
"""Runners that simulate the engine: their answers tell about it, their speed does not."""
_RAM_BYTES_PER_PARAM = 12.0
"""Peak of the larger of source (float32 weights, 4 bytes) and CPU twin (float32 weights, folded and
transposed: 8), with the file still mapped and the logits of one window; 2.2 GB for SmolLM2's 134 M
parameters, libraries included (measured 2026-11-24)."""
_FLOPS_PER_S = 1.0e11
"""Rough float32 rate of two AVX2 cores, for the estimate against the time limit (2026-11-24)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Acceptance:
    """What an engine must show.

    Attributes:
        targets: Workloads with the rates that the target card must reach; the plan holds them
            against the card's ceiling, a run on the card measures them.
        cpu_workloads: Workloads measured on this machine's CPU.
        text: Held-out text for quality; must not overlap with the calibration text.
        windows: How many windows of it.
        window_tokens: Tokens of one window; each predicts one token less.
        max_perplexity_increase: 0.01 allows one percent over the source.
        max_mean_kl_nats: Allowed mean KL divergence, source to engine.
        min_top1_agreement: Required share of equal most likely tokens.
        sample_prompt: Answered greedily and shown.
        sample_tokens: Longest sample.
        repeats: Timed runs of each workload, after one warm-up.
        time_limit_s: Above this estimate the whole model is not run here.
        seed: For prompts and bootstrap.
    """

    targets: Listed[Workload]
    cpu_workloads: Listed[Workload]
    text: TextCorpus
    windows: PositiveInt
    window_tokens: PositiveInt
    max_perplexity_increase: NonNegativeFloat
    max_mean_kl_nats: PositiveFloat
    min_top1_agreement: NonNegativeFloat
    sample_prompt: str
    sample_tokens: PositiveInt
    repeats: PositiveInt
    time_limit_s: PositiveFloat
    seed: NonNegativeInt

    def __post_init__(self) -> None:
        if self.min_top1_agreement > 1.0:
            raise ValueError(f"min_top1_agreement ({self.min_top1_agreement}) must be <= 1")
        names = [workload.name for workload in (*self.targets, *self.cpu_workloads)]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"workload names must differ; {', '.join(repeated)} repeats")
        for workload in self.cpu_workloads:
            if workload.min_share_of_ceiling is not None:
                raise ValueError(
                    f"cpu_workloads: {workload.name} has min_share_of_ceiling, which is a share of "
                    "the target card's ceiling; use min_output_tokens_per_s"
                )

    @property
    def limits(self) -> QualityLimits:
        """The thresholds that the judge applies to quality."""
        return QualityLimits(
            max_perplexity_increase=self.max_perplexity_increase,
            max_mean_kl_nats=self.max_mean_kl_nats,
            min_top1_agreement=self.min_top1_agreement,
        )

    def judged_positions(self, shape: ModelShape) -> int:
        """Positions whose source log-probabilities are kept; 0 where time rules the model out."""
        if self.too_much(shape, available_bytes=1 << 62):
            return 0
        return self.windows * (self.window_tokens - 1)

    def key(self, config: Mapping[str, Any], runner: Runner, package_digest: str) -> str:
        """Names a measurement: the same key, the same question about the same bytes.

        Args:
            config: The resolved `acceptance` and `runner` sections of the recipe.
            runner: What executes the engine.
            package_digest: The package.
        """
        return digest_of(
            {
                "config": dict(config),
                "runner": runner.name,
                "package": package_digest,
                "text": text_digest(self.text.documents()),
                "tools": {name: version(name) for name in _TOOLS},
                "code": source_digest(*_CODE),
            }
        )

    def check_inputs(self, shape: ModelShape, max_seq_len: int) -> None:
        """Find faults that need no model: workloads and windows that do not fit the engine.

        Raises:
            RecipeError: With all faults.
        """
        faults = [
            Fault(
                f"acceptance.cpu_workloads[{index}]",
                f"isl + osl ({load.isl + load.osl}) exceeds the engine's context ({max_seq_len})",
            )
            for index, load in enumerate(self.cpu_workloads)
            if load.isl + load.osl > max_seq_len
        ]
        if self.window_tokens > min(max_seq_len, shape.max_position_embeddings):
            message = f"{self.window_tokens} exceeds the engine's context ({max_seq_len})"
            faults.append(Fault("acceptance.window_tokens", message))
        if faults:
            raise RecipeError(faults)

    def check_text(self, calibration: tuple[str, ...]) -> None:
        """Demand that calibration has not seen the text.

        Raises:
            RecipeError: It has.
        """
        require_disjoint(calibration, self.text.documents(), "acceptance.text")

    def measure(self, subject: Subject, cache: StageCache) -> tuple[Report, Verdict]:
        """Run what can be run here and judge it.

        Raises:
            CorruptError: Logits that are not finite.
            RecipeError: The text is too short.
        """
        not_run = [f"{subject.target.card}: no such card here; speed and numerics on it"]
        if subject.engine.limits.kv_cache_dtype == "fp8":
            not_run.append("FP8 KV cache: what runs here keeps the cache in float32")
        reason = subject.runner.why_not(subject.engine) or self.too_much(
            subject.shape, _available_bytes()
        )
        speed: list[dict[str, Any]] = []
        quality: dict[str, Any] = {}
        checks = dict(subject.engine.checks)
        if reason:
            log.warning("Not running the whole model: %s", reason)
            not_run.append(f"whole model: {reason}")
            if subject.engine.twin_dir is not None:
                checks["two_layer_cut"] = compare_cut(
                    subject.checkpoint.dir, subject.engine.twin_dir
                )
        else:
            quality, speed = self._run(subject, cache)
            if self.cpu_workloads and not speed:
                not_run.append(f"speed: runner {subject.runner.name} only simulates the engine")
        report = Report(
            digest=subject.package_digest,
            card=subject.target.card,
            conditions=_conditions(subject.runner, self.text),
            speed=speed,
            quality=quality,
            not_run=not_run,
            checks=checks,
        )
        return report, judge(report, self.limits, ran=not reason, on_target=False)

    def too_much(self, shape: ModelShape, available_bytes: int) -> str | None:
        """Why the whole model does not run on this machine's CPU, by memory or time; else None."""
        need = _RAM_BYTES_PER_PARAM * shape.params
        if need > available_bytes:
            return f"needs about {need / 1e9:.1f} GB RAM, {available_bytes / 1e9:.1f} GB are free"
        tokens = 2 * self.windows * self.window_tokens
        tokens += 2 * (self.repeats + 1) * sum(w.batch * w.osl for w in self.cpu_workloads)
        seconds = 2.0 * shape.params * tokens / _FLOPS_PER_S
        if seconds > self.time_limit_s:
            return (
                f"would take about {seconds:.0f} s on this CPU, acceptance.time_limit_s is "
                f"{self.time_limit_s:.0f}"
            )
        return None

    def _run(
        self, subject: Subject, cache: StageCache
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Quality and speed of the whole model."""
        from pipeline.runners.transformers import open_source

        weights = subject.checkpoint.weights
        tokenizer = load_tokenizer(subject.engine.dir)
        windows = pack_windows(
            self.text.documents(),
            tokenizer,
            seq_len=self.window_tokens,
            count=self.windows,
            seed=None,
        )
        source = source_figures(weights, windows, cache)
        with subject.runner.open(subject.engine) as session:
            figures = engine_figures(lambda tokens: session.logits(tokens), windows, source)
            quality = summarize_quality(source.nll, figures, self.seed)
            quality["sample"] = self._sample(session, tokenizer)
            log.info("Sample: %s", quality["sample"]["answer"].replace("\n", " "))
            if subject.runner.name in _SIMULATIONS:
                return quality, []
            with open_source(weights.dir) as baseline:
                contenders: dict[str, Session] = {"engine": session, "transformers": baseline}
                speed = []
                for workload in self.cpu_workloads:
                    samples = measure_speed(
                        workload,
                        contenders,
                        vocab_size=subject.shape.vocab_size,
                        repeats=self.repeats,
                        seed=self.seed,
                    )
                    speed.append(summarize(workload, samples))
                    log.info(
                        "%s: %.1f tok/s, Transformers %.1f",
                        workload.name,
                        speed[-1]["output_tokens_per_s"],
                        speed[-1]["transformers"]["output_tokens_per_s"],
                    )
        return quality, speed

    def _sample(self, session: Session, tokenizer: Any) -> dict[str, str]:
        """The prompt and its greedy answer."""
        from pipeline.runners.chat import chat_prompt, eos_ids

        prompt = chat_prompt(tokenizer, self.sample_prompt)
        tokens = list(session.stream(prompt, self.sample_tokens, eos_ids(tokenizer)))
        return {"prompt": self.sample_prompt, "answer": tokenizer.decode(tokens)}


@plain_dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured.

    Attributes:
        engine: The engine.
        package_digest: The sealed package that holds it.
        checkpoint: What it was made from, with the source weights.
        shape: The model.
        target: The card that it is for.
        runner: What executes it here.
    """

    engine: Engine
    package_digest: str
    checkpoint: Checkpoint
    shape: ModelShape
    target: Target
    runner: Runner


def _available_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _conditions(runner: Runner, text: TextCorpus) -> dict[str, Any]:
    """Where and with what it was measured."""
    import os

    return {
        "device": "cpu",
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "runner": runner.name,
        "text": text.origin,
        "tools": {name: version(name) for name in _TOOLS},
    }
