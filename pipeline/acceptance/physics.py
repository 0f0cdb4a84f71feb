"""What was measured against what the card allows. Pure: rates and a roofline in, findings out.

The plan's ceiling is of one decode step. A measured rate is of a whole run, prefill included, so
the ceiling here is that of the whole run: B requests of `isl` prompt and `osl` output tokens need

    memory:  (osl x weight bytes + B x (osl - 1) x context x KV bytes) / bandwidth
    compute: B x (isl + osl - 1) x layer time + B x osl x lm_head time

and no less than the larger of the two, even where prefill and decode share their steps: the weights
are read in at least `osl` steps, and the first output token comes from the prefill. Long decodes
that memory bounds come out at the plan's `ceiling`. A prefix cache that holds the prompts makes the
compute term wrong; then the run does not measure its workload, which is what the finding says.

Where lengths differ, `isl` and `osl` are the means of what was sent and generated. The ceiling
stays one: a batch goes on for as many steps as its longest answer, and lengths that vary make the
mean context of a token longer than that of the mean request. Where requests arrive at a rate,
`batch` is the most at once; a run below the ceiling is held by its arrivals, so nothing is said of
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.core.values import Finding
from pipeline.plan.ceilings import Roofline


@dataclass(frozen=True, kw_only=True)
class MeasuredRate:
    """One measured workload.

    Attributes:
        name: Name of the workload.
        batch: Requests at once, or the most at once.
        isl: Prompt tokens of each, or their mean.
        osl: Output tokens of each that were generated, or their mean.
        output_tokens_per_s: Output tokens / seconds of the whole run (median).
        open_loop: Requests arrive at a rate.
    """

    name: str
    batch: int
    isl: float
    osl: float
    output_tokens_per_s: float
    open_loop: bool = False


@dataclass(frozen=True, kw_only=True)
class PhysicsLimits:
    """When a share of the ceiling is worth a finding.

    Attributes:
        tolerance: A rate above (1 + tolerance) x the ceiling at the larger of listed and measured
            bandwidth is anomalous. 0.05 covers what was seen: an RTX 4090 listed at 1008 GB/s
            copies up to 1018 (clpeak #108), and a probe of two seconds has noise of its own.
        min_share: A share below this is a note. vLLM 0.24 with Phi-3-mini's shape in FP8 reaches
            41 % at batch 1 on an H100 (our measurement, 2026-11-24); 0.25 is far below that.
        l2_cache_bytes: Weights that may stay in the card's L2 cache from one step to the next and
            are not counted for `anomalous` (72 MB on an RTX 4090, 50 MB on an H100: NVIDIA's
            architecture whitepapers).
        min_bandwidth_share: A measured bandwidth below this share of the listed one is named among
            the reasons. 0.85: an RTX 4090 limited to 248 W copied 867 of 1008 GB/s, 86 %
            (clpeak #106), and unlimited 95 % or more (#108).
    """

    tolerance: float = 0.05
    min_share: float = 0.25
    l2_cache_bytes: int = 72_000_000
    min_bandwidth_share: float = 0.85


PHYSICS = PhysicsLimits()


def run_ceiling(
    load: MeasuredRate,
    roofline: Roofline,
    *,
    bandwidth_bytes_per_s: float,
    cached_weight_bytes: int = 0,
) -> tuple[float, Literal["memory", "compute"]]:
    """Most output tokens per second of a whole run, and what sets it; see the module's formula.

    Args:
        load: The workload; its rate is not looked at.
        roofline: The model on the card.
        bandwidth_bytes_per_s: Taken instead of the roofline's.
        cached_weight_bytes: Weights that need not be read again in every step.
    """
    batch, isl, osl = load.batch, load.isl, load.osl
    context = roofline.mean_context(isl, osl) if osl > 1 else 0.0
    step_bytes = max(roofline.step_weight_bytes - cached_weight_bytes, 0)
    kv_bytes = batch * (osl - 1) * context * roofline.kv_bytes_per_token
    memory_s = (osl * step_bytes + kv_bytes) / bandwidth_bytes_per_s
    compute_s = batch * (
        (isl + osl - 1) * roofline.layer_s_per_token + osl * roofline.lm_head_s_per_token
    )
    bound: Literal["memory", "compute"] = "memory" if memory_s >= compute_s else "compute"
    return batch * osl / max(memory_s, compute_s), bound


def ceiling_share(
    load: MeasuredRate, roofline: Roofline, measured_bandwidth_bytes_per_s: float | None = None
) -> dict[str, Any]:
    """Share of the ceiling that a workload reached, as in the report's `physics`.

    Returns:
        `name`, `output_tokens_per_s`; `ceiling_tokens_per_s` of the whole run and the `bandwidth`
        that it is at: `measured` where there is one, else `listed`; `share`, measured over ceiling;
        `bound`, what sets the ceiling: `memory` or `compute`.
    """
    bandwidth = measured_bandwidth_bytes_per_s or roofline.bandwidth_bytes_per_s
    ceiling, bound = run_ceiling(load, roofline, bandwidth_bytes_per_s=bandwidth)
    return {
        "name": load.name,
        "output_tokens_per_s": load.output_tokens_per_s,
        "ceiling_tokens_per_s": ceiling,
        "bandwidth": "measured" if measured_bandwidth_bytes_per_s else "listed",
        "share": load.output_tokens_per_s / ceiling,
        "bound": bound,
    }


def judge_physics(
    loads: Sequence[MeasuredRate],
    roofline: Roofline,
    measured_bandwidth_bytes_per_s: float | None = None,
    limits: PhysicsLimits = PHYSICS,
) -> Iterator[Finding]:
    """Findings of rates that were measured on the card of the roofline.

    Args:
        loads: What was measured.
        roofline: The model on that card.
        measured_bandwidth_bytes_per_s: From a copy probe on that very card; None without one. A
            copy reads and writes, so it shows somewhat less than reading alone can reach: for
            `anomalous` the larger of it and the listed bandwidth counts.
        limits: When to speak.

    Returns:
        `anomalous` for a rate above the ceiling, a note for a share below the stated one.
    """
    best = max(roofline.bandwidth_bytes_per_s, measured_bandwidth_bytes_per_s or 0.0)
    for load in loads:
        rate = load.output_tokens_per_s
        ceiling, _ = run_ceiling(
            load,
            roofline,
            bandwidth_bytes_per_s=best,
            cached_weight_bytes=limits.l2_cache_bytes,
        )
        reached = ceiling_share(load, roofline, measured_bandwidth_bytes_per_s)
        if rate > (1 + limits.tolerance) * ceiling:
            message = (
                f"{load.name}: {rate:.1f} tok/s is above the {ceiling:.1f} that the card allows "
                f"(tolerance {limits.tolerance:.0%}): a measuring fault; look for answers that "
                "ended early, prompts served from a prefix cache, a clock that stops before the "
                "device does, or a card that is not the one of the plan"
            )
            yield Finding(kind="anomalous", message=message)
        elif reached["share"] < limits.min_share and not load.open_loop:
            message = (
                f"{load.name}: {rate:.1f} tok/s is {reached['share']:.0%} of the "
                f"{reached['ceiling_tokens_per_s']:.1f} that the card allows at "
                f"{reached['bandwidth']} bandwidth ({reached['bound']}-bound), below "
                f"{limits.min_share:.0%}; likely: "
            )
            reasons = _reasons(reached["bound"], roofline, limits, measured_bandwidth_bytes_per_s)
            yield Finding(kind="note", message=message + "; ".join(reasons))


def _reasons(
    bound: str, roofline: Roofline, limits: PhysicsLimits, measured: float | None
) -> Iterator[str]:
    """Why a run may be far below its ceiling, the likeliest first."""
    listed = roofline.bandwidth_bytes_per_s
    if measured is not None and measured < limits.min_bandwidth_share * listed:
        yield (
            f"the probe copied {measured / 1e9:.0f} of {listed / 1e9:.0f} GB/s, so the card itself "
            "is held back: its power limit, memory clock or another process"
        )
    if bound == "memory":
        yield "no CUDA graphs or a very small model, so that each step waits for the host"
        yield "requests that were not decoded together: see the scheduler's limits"
    else:
        yield "prompts that are prefilled one by one: see max_num_tokens"
    yield "linears that run in 16 bit instead of FP8"
    yield "throttling: see clocks, temperatures and throttle reasons in the conditions"
