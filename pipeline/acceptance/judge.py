"""The judge: numbers in, verdict out; pure, so it is tested at the exact thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.core.values import Finding, Report, Verdict, VerdictName

if TYPE_CHECKING:
    from pipeline.acceptance.acceptance import Acceptance

_SEVERITY: tuple[VerdictName, ...] = ("anomalous", "regression", "rejected", "inconclusive")
"""The worst finding names the verdict: a measuring fault makes every other figure worthless, a
wrong answer is worse than a slow one."""


SMALL_KL_NATS = 0.001
"""Nobody can tell models apart that are nearer: the noise floor of a model without outliers can be
zero, and another runtime is never that near."""


def judge(
    report: Report,
    limits: Acceptance,
    *,
    ran: bool,
    on_target: bool,
    more: Sequence[Finding] = (),
) -> Verdict:
    """Judge a report.

    Args:
        report: What was measured.
        limits: What quality may lose.
        ran: Whether the engine, its graph or its checkpoint ran here at all.
        on_target: Whether it ran on the card that it is for.
        more: Findings of parts that judge themselves: chat, spread, physics, conditions, sustained.

    Returns:
        The worst finding's verdict; without one `accepted` (ran on its card), `checked` (its graph
        ran elsewhere) or `compiled` (nothing ran).
    """
    findings = [*_speed_findings(report.speed), *_quality_findings(report.quality, limits), *more]
    findings += [Finding(kind="note", message=f"not run: {what}") for what in report.not_run]
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
            yield Finding(kind="rejected", message=message)


def _quality_findings(quality: Mapping[str, Any], limits: Acceptance) -> Iterator[Finding]:
    if not quality:
        return
    change = quality["perplexity_change"]
    if change["value"] > limits.max_perplexity_increase:
        yield Finding(
            kind="regression",
            message=f"perplexity {change['value']:+.2%} against the source (95 % interval "
            f"{change['low']:+.2%} to {change['high']:+.2%}), "
            f"{limits.max_perplexity_increase:+.2%} allowed",
        )
    # The whole interval beyond what could be noise: the two did not see the same text or weights.
    if change["high"] < -limits.max_perplexity_increase:
        yield Finding(
            kind="anomalous",
            message=f"perplexity {change['value']:+.2%} against the source: a quantized model "
            "that is better by more than the noise points to a measuring fault",
        )
    kl = quality["mean_kl_nats"]["value"]
    if kl > limits.max_mean_kl_nats:
        yield Finding(
            kind="regression",
            message=f"mean KL {kl:.4f} nats, {limits.max_mean_kl_nats:.4f} allowed",
        )
    top1 = quality["top1_agreement"]["value"]
    if top1 < limits.min_top1_agreement:
        yield Finding(
            kind="regression",
            message=f"top-1 agreement {top1:.2%}, {limits.min_top1_agreement:.2%} required",
        )
    if (reference := quality.get("fp8_reference")) and reference["judged"]:
        yield from _reference_findings(reference, limits)


def _reference_findings(reference: Mapping[str, Any], limits: Acceptance) -> Iterator[Finding]:
    """Whether the engine computes its own checkpoint, as far as two runtimes can agree on one."""
    kl, floor = (reference[key]["mean_kl_nats"]["value"] for key in ("engine", "noise_floor"))
    allowed = max(limits.max_reference_noise * floor, SMALL_KL_NATS)
    if kl > allowed:
        yield Finding(
            kind="regression",
            message=f"mean KL {kl:.4f} nats to its own FP8 checkpoint, {allowed:.4f} allowed "
            f"({limits.max_reference_noise:g} x the checkpoint's distance from itself): the "
            "runtime computes something else than the checkpoint says",
        )
