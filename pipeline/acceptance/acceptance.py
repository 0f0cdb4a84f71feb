"""What acceptance asks, and of what; `pipeline.acceptance.measure` asks it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.acceptance.chat import ChatSettings
from pipeline.acceptance.sustained import SustainedRun
from pipeline.core.cache import Stage
from pipeline.core.errors import Fault, RecipeError
from pipeline.core.published import digest_of
from pipeline.core.settings import STRICT, Listed
from pipeline.core.values import Engine, Weights
from pipeline.model.spec import ModelSpec
from pipeline.plan import Plan
from pipeline.quant.spec import SHAPING_CODE
from pipeline.runners.runner import Device, Runner, installed_version, why_not_workload
from pipeline.runners.workload import Workload
from pipeline.sources.text.corpus import Text, require_disjoint, text_digest

STAGE = Stage(
    name="acceptance",
    version=2,
    code=(
        "pipeline.acceptance",
        "pipeline.core.gpu",
        "pipeline.plan",
        "pipeline.runners",
        "pipeline.sources.text.corpus",
        *SHAPING_CODE,
    ),
)
_TOOLS = ("onnxruntime", "torch", "transformers", "vllm", "tensorrt-llm")
_RAM_BYTES_PER_PARAM = 12.0
"""Peak of the larger of source (float32 weights, 4 bytes) and CPU graph (float32 weights, folded
and transposed: 8), with the file still mapped and the logits of one window; 2.2 GB for SmolLM2's
134 M parameters, libraries included (measured 2026-11-24)."""
_FLOPS_PER_S = 1.0e11
"""Rough float32 rate of two AVX2 cores, for the estimate against the time limit (2026-11-24)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Acceptance:
    """What an engine must show.

    Attributes:
        targets: Workloads with the rates that the target card must reach.
        text: Held-out text for quality; must not overlap with the calibration text.
        windows: How many windows of it.
        reference_windows: The first of them, over which the checkpoint itself is simulated.
        window_tokens: Tokens of one window; each predicts one token less.
        max_perplexity_increase: 0.01 allows one percent over the source.
        max_mean_kl_nats: Allowed mean KL divergence, source to engine.
        min_top1_agreement: Required share of equal most likely tokens.
        max_reference_noise: Allowed mean KL divergence of the engine to its own checkpoint, as
            a multiple of the checkpoint's distance from itself, its sums rounded otherwise.
        repeats: Timed runs of each workload.
        max_spread: Allowed spread of them, (largest - smallest) / median; beyond it the verdict is
            `inconclusive`.
        time_limit_s: Above this estimate the whole model is not run here.
        seed: For prompts and bootstrap.
    """

    targets: Listed[Workload]
    text: Text
    windows: PositiveInt
    reference_windows: PositiveInt
    window_tokens: PositiveInt
    max_perplexity_increase: NonNegativeFloat
    max_mean_kl_nats: PositiveFloat
    min_top1_agreement: NonNegativeFloat
    repeats: PositiveInt
    time_limit_s: PositiveFloat
    seed: NonNegativeInt
    max_spread: PositiveFloat = 0.5
    max_reference_noise: PositiveFloat = 2.0
    chat: ChatSettings | None = None
    sustained: SustainedRun = SustainedRun()

    def __post_init__(self) -> None:
        if self.min_top1_agreement > 1.0:
            raise ValueError(f"min_top1_agreement ({self.min_top1_agreement}) must be <= 1")
        names = [workload.name for workload in self.targets]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"workload names must differ; {', '.join(repeated)} repeats")

    @property
    def _all_windows(self) -> int:
        """Of the source, and of the simulated checkpoint."""
        return self.windows + min(self.reference_windows, self.windows)

    def judged_positions(self, shape: ModelSpec) -> int:
        """Positions whose log-probabilities are kept; 0 where time rules the model out."""
        return 0 if self.too_much(shape, 1 << 62) else self._all_windows * (self.window_tokens - 1)

    def key(self, config: Mapping[str, Any], runner: Runner, package_digest: str) -> str:
        """Names a measurement by recipe and package: the same key, the same question."""
        return digest_of(
            {
                **STAGE.identity,
                "config": dict(config),
                "runner": runner.name,
                "package": package_digest,
                "text": text_digest(self.text.documents()),
                # The config has only the paths of files with prompts.
                "loads": [load.digest for load in self.targets],
                "tools": tool_versions(),
            }
        )

    def check_inputs(self, shape: ModelSpec, max_seq_len: int, device: Device = "cpu") -> None:
        """Find faults that need no model, like long windows; a RecipeError has all of them."""
        faults: list[Fault] = []
        for index, load in enumerate(self.targets):
            faults += load.faults(f"acceptance.targets[{index}]")
        # A server's logits come with one generated token, for which there must be room.
        room = max_seq_len - 1 if device == "cuda" else max_seq_len
        if self.window_tokens > min(room, shape.max_position_embeddings):
            message = f"{self.window_tokens} exceeds the engine's context ({max_seq_len})"
            if self.window_tokens == max_seq_len:
                message += " less the token that a server generates after it"
            faults.append(Fault("acceptance.window_tokens", message))
        if faults:
            raise RecipeError(faults)

    def ability_faults(self, runner: Runner) -> tuple[Fault, ...]:
        """What acceptance asks that a runner does not execute; no speed is measured on a CPU."""
        faults = []
        for index, load in enumerate(self.targets if runner.device == "cuda" else ()):
            path = f"acceptance.targets[{index}]"
            faults += [Fault(path, why) for why in why_not_workload(runner, load)]
        return tuple(faults)

    def check_text(self, calibration: tuple[str, ...]) -> None:
        """Refuse text that calibration has seen."""
        require_disjoint(calibration, self.text.documents(), "acceptance.text")

    def too_much(self, shape: ModelSpec, free_bytes: int) -> str | None:
        """Why the whole model does not run in `free_bytes` on this CPU, or in time; else None."""
        need = _RAM_BYTES_PER_PARAM * shape.params
        if need > free_bytes:
            return f"needs about {need / 1e9:.1f} GB RAM, {free_bytes / 1e9:.1f} GB are free"
        # Source and engine over all windows, the checkpoint twice over those of the reference.
        tokens = 2 * self._all_windows * self.window_tokens
        seconds = 2.0 * shape.params * tokens / _FLOPS_PER_S
        if seconds > self.time_limit_s:
            return (
                f"would take about {seconds:.0f} s on this CPU, acceptance.time_limit_s is "
                f"{self.time_limit_s:.0f}"
            )
        return None


def tool_versions() -> dict[str, str]:
    """Versions of what may execute something; what is not installed does not."""
    found = {name: installed_version(name) for name in _TOOLS}
    return {name: version for name, version in found.items() if version}


@plain_dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured: an engine in a sealed package, its source, and what executes it here.

    `checkpoint_dir`: the unified checkpoint of it; None where only the package is at hand.
    """

    engine: Engine
    package_digest: str
    weights: Weights
    checkpoint_dir: Path | None
    plan: Plan
    runner: Runner
