"""The judge: numbers in, verdict out; pure, so it is tested at the exact thresholds.

**What was measured against what the card allows.** The plan's ceiling is of one decode step. A
measured rate is of a whole run, prefill included, so the ceiling here is that of the whole run: B
requests of `isl` prompt and `osl` output tokens need

    memory:  (osl x weight bytes + B x (osl - 1) x context x KV bytes) / bandwidth
    compute: B x (isl + osl - 1) x layer time + B x osl x lm_head time

and no less than the larger of the two, even where prefill and decode share their steps: the weights
are read in at least `osl` steps, and the first output token comes from the prefill. Long decodes
that memory bounds come out at the plan's `ceiling`. A prefix cache that holds the prompts makes the
compute term wrong; then the run does not measure its workload, which is what the finding says.

Where lengths differ, `isl` and `osl` are the means of what was sent and generated: still a ceiling,
since a batch goes on for as many steps as its longest answer. Where requests arrive at a rate,
`batch` is the most at once; a run below the ceiling is held by its arrivals and is no finding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pipeline.core.published import VerdictName
from pipeline.core.values import Finding, Report, Verdict
from pipeline.plan.ceilings import Roofline

if TYPE_CHECKING:
    from pipeline.acceptance.acceptance import Acceptance

_SEVERITY: tuple[VerdictName, ...] = ("anomalous", "regression", "rejected", "inconclusive")
"""The worst finding names the verdict: a measuring fault makes every other figure worthless, a
wrong answer is worse than a slow one."""
SMALL_KL_NATS = 0.001
"""Always allowed: the noise floor of a model without outliers can be zero, and another runtime is
never that near."""


def judge(
    report: Report,
    limits: Acceptance,
    *,
    ran: bool,
    on_target: bool,
    more: Sequence[Finding] = (),
) -> Verdict:
    """The worst finding's verdict; without one `accepted`, `checked` or `compiled`.

    `ran`: the engine, its graph or its checkpoint; `more`: of parts that judge themselves.
    """
    findings = [*_speed_findings(report.speed), *_quality_findings(report.quality, limits), *more]
    findings += [Finding("note", f"not run: {what}") for what in report.not_run]
    failing = {finding.kind for finding in findings}
    for name in _SEVERITY:
        if name in failing:
            return Verdict(name=name, findings=tuple(findings))
    passing: VerdictName = "accepted" if on_target else "checked"
    return Verdict(name=passing if ran else "compiled", findings=tuple(findings))


def _speed_findings(speed: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    for entry in speed:
        rate, wanted = entry["output_tokens_per_s"], entry["min_output_tokens_per_s"]
        if wanted is not None and rate < wanted:
            message = f"{entry['workload']}: {rate:.1f} tok/s, {wanted:.1f} are required"
            yield Finding("rejected", message)


def _quality_findings(quality: Mapping[str, Any], limits: Acceptance) -> Iterator[Finding]:
    if not quality:
        return
    change = quality["perplexity_change"]
    if change["value"] > limits.max_perplexity_increase:
        yield Finding(
            "regression",
            f"perplexity {change['value']:+.2%} against the source (95 % interval "
            f"{change['low']:+.2%} to {change['high']:+.2%}), "
            f"{limits.max_perplexity_increase:+.2%} allowed",
        )
    # The whole interval beyond what could be noise: the two did not see the same text or weights.
    if change["high"] < -limits.max_perplexity_increase:
        yield Finding(
            "anomalous",
            f"perplexity {change['value']:+.2%} against the source: a quantized model "
            "that is better by more than the noise points to a measuring fault",
        )
    kl = quality["mean_kl_nats"]["value"]
    if kl > limits.max_mean_kl_nats:
        yield Finding("regression", f"mean KL {kl:.4f} nats, {limits.max_mean_kl_nats:.4f} allowed")
    top1 = quality["top1_agreement"]["value"]
    if top1 < limits.min_top1_agreement:
        yield Finding(
            "regression", f"top-1 agreement {top1:.2%}, {limits.min_top1_agreement:.2%} required"
        )
    if (reference := quality.get("checkpoint_reference")) and reference["judged"]:
        yield from _reference_findings(reference, limits)


def _reference_findings(reference: Mapping[str, Any], limits: Acceptance) -> Iterator[Finding]:
    """Whether the engine computes its own checkpoint, as far as two runtimes can agree on one."""
    kl, floor = (reference[key]["mean_kl_nats"]["value"] for key in ("engine", "noise_floor"))
    allowed = max(limits.max_reference_noise * floor, SMALL_KL_NATS)
    if kl > allowed:
        yield Finding(
            "regression",
            f"mean KL {kl:.4f} nats to its own checkpoint, {allowed:.4f} allowed "
            f"({limits.max_reference_noise:g} x the checkpoint's distance from itself): the "
            "runtime computes something else than the checkpoint says",
        )


TOLERANCE = 0.05
"""Above (1 + this) x the ceiling a rate is anomalous: an RTX 4090 listed at 1008 GB/s copies up to
1018 (clpeak #108), and a probe of two seconds has noise of its own."""
MIN_SHARE = 0.25
"""A lower share of the ceiling is a note. vLLM 0.24 with Phi-3-mini's shape in FP8 reaches 41 % at
batch 1 on an H100 (our measurement, 2026-11-24)."""
L2_CACHE_BYTES = 72_000_000
"""Weights that may stay in the card's L2 cache from one step to the next are not counted for
`anomalous` (72 MB on an RTX 4090, 50 MB on an H100: NVIDIA's architecture whitepapers)."""
MIN_BANDWIDTH_SHARE = 0.85
"""A lower measured share of the listed bandwidth is named among the reasons. An RTX 4090 limited to
248 W copied 867 of 1008 GB/s, 86 % (clpeak #106), and unlimited 95 % or more (#108)."""


def run_ceiling(
    entry: Mapping[str, Any],
    roofline: Roofline,
    *,
    bandwidth_bytes_per_s: float,
    cached_weight_bytes: int = 0,
) -> tuple[float, Literal["memory", "compute"]]:
    """Most output tokens per second of an entry's run, and what sets it; see the module's formula.

    The bandwidth is taken instead of the roofline's; cached weights are read once.
    """
    batch = entry["batch"]
    isl, osl = (entry.get(f"mean_{length}", entry[length]) for length in ("isl", "osl"))
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
    entry: Mapping[str, Any],
    roofline: Roofline,
    measured_bandwidth_bytes_per_s: float | None = None,
) -> dict[str, Any]:
    """The report's `physics` of an entry of `speed`, at the measured bandwidth if there is one."""
    bandwidth = measured_bandwidth_bytes_per_s or roofline.bandwidth_bytes_per_s
    ceiling, bound = run_ceiling(entry, roofline, bandwidth_bytes_per_s=bandwidth)
    return {
        "name": entry["workload"],
        "output_tokens_per_s": entry["output_tokens_per_s"],
        "ceiling_tokens_per_s": ceiling,
        "bandwidth": "measured" if measured_bandwidth_bytes_per_s else "listed",
        "share": entry["output_tokens_per_s"] / ceiling,
        "bound": bound,
    }


def judge_physics(
    speed: Sequence[Mapping[str, Any]],
    roofline: Roofline,
    measured_bandwidth_bytes_per_s: float | None = None,
) -> Iterator[Finding]:
    """`anomalous` for a rate above the ceiling, a note for a share below the stated one.

    A copy probe reads and writes, so it shows somewhat less than reading alone can reach: for
    `anomalous` the larger of its bandwidth and the listed one counts.
    """
    best = max(roofline.bandwidth_bytes_per_s, measured_bandwidth_bytes_per_s or 0.0)
    for entry in speed:
        name, rate = entry["workload"], entry["output_tokens_per_s"]
        ceiling, _ = run_ceiling(
            entry, roofline, bandwidth_bytes_per_s=best, cached_weight_bytes=L2_CACHE_BYTES
        )
        reached = ceiling_share(entry, roofline, measured_bandwidth_bytes_per_s)
        if rate > (1 + TOLERANCE) * ceiling:
            message = (
                f"{name}: {rate:.1f} tok/s is above the {ceiling:.1f} that the card allows "
                f"(tolerance {TOLERANCE:.0%}): a measuring fault; look for answers that "
                "ended early, prompts served from a prefix cache, a clock that stops before the "
                "device does, or a card that is not the one of the plan"
            )
            yield Finding("anomalous", message)
        elif reached["share"] < MIN_SHARE and "request_rate" not in entry:
            message = (
                f"{name}: {rate:.1f} tok/s is {reached['share']:.0%} of the "
                f"{reached['ceiling_tokens_per_s']:.1f} that the card allows at "
                f"{reached['bandwidth']} bandwidth ({reached['bound']}-bound), below "
                f"{MIN_SHARE:.0%}; likely: "
            )
            reasons = _reasons(reached["bound"], roofline, measured_bandwidth_bytes_per_s)
            yield Finding("note", message + "; ".join(reasons))


def _reasons(bound: str, roofline: Roofline, measured: float | None) -> Iterator[str]:
    """Why a run may be far below its ceiling, the likeliest first."""
    listed = roofline.bandwidth_bytes_per_s
    if measured is not None and measured < MIN_BANDWIDTH_SHARE * listed:
        yield (
            f"the probe copied {measured / 1e9:.0f} of {listed / 1e9:.0f} GB/s, so the card itself "
            "is held back: its power limit, memory clock or another process"
        )
    if bound == "memory":
        yield "no CUDA graphs or a very small model, so that each step waits for the host"
        yield "requests that were not decoded together: see the scheduler's limits"
    else:
        yield "prompts that are prefilled one by one: see max_num_tokens"
    yield "linears that run in another precision than they were quantized to"
    yield "throttling: see clocks, temperatures and throttle reasons in the conditions"
