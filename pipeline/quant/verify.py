"""Checks every tensor of an exported checkpoint against the weights that it was made from.

An exporter can drop, empty or zero a tensor and still succeed.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline.core.errors import CorruptError
from pipeline.quant.bf16 import SPEC as SIXTEEN_BIT
from pipeline.quant.spec import QuantSpec
from pipeline.quant.unified import UnifiedCheckpoint, all_finite, list_faults, torch_view

MAX_LOST_SHARE = 0.1
"""Of a linear's non-zero weights at most so many may round to zero. With one E4M3 scale for the
tensor those below 2^-10 / 448 of the largest do: of normally distributed weights 9 in a million, of
SmolLM2's linears 12 in a million at most (2026-11-30). More says that a few values set the scale.
"""
_SLACK = 1.04
"""An exporter that divides by the scale in bfloat16, as on a GPU, rounds by 2^-9 before it rounds
by 2^-4: 3 % more."""
_CHUNK_ROWS = 512
"""So that the intermediate values of a chunk stay in the processor's cache."""


def require_finite(source: UnifiedCheckpoint) -> None:
    """Refuse weights, norms and embeddings that hold NaN or infinite values (CorruptError)."""
    broken = [name for name in source.tensors if not all_finite(source.read(name))]
    if broken:
        raise CorruptError(
            f"{source.dir} holds NaN or infinite values; fetch the weights again, or choose others:"
            f"{list_faults(broken)}"
        )


def verify_checkpoint(
    checkpoint_dir: Path,
    weights_dir: Path,
    precision: QuantSpec,
    quantized_linears: Collection[str],
) -> dict[str, Any]:
    """Compare an exported checkpoint with its source, tensor by tensor.

    Present, nothing extra, right shape and dtype, 16-bit tensors equal to the source rounded to
    bfloat16, dequantized weights within the precision's rounding error and not lost to zero, two
    KV-cache scales for each attention, all scales finite and positive.

    Returns the ledger of what was rounded: `precision`, `relative_error` (linear -> norm of its
    rounding error over the norm of its weights, three digits: the order of a sum does not show in
    them), `kept_16bit` (linears that were rounded to bfloat16 only). CorruptError lists faults.
    """
    checkpoint, source = UnifiedCheckpoint(checkpoint_dir), UnifiedCheckpoint(weights_dir)
    wanted = set(source.tensors) - ({"lm_head.weight"} if source.spec.tied else set())
    scales = {f"{module}.{kind}" for module in quantized_linears for kind in precision.scales}
    scales |= set(source.spec.kv_scales())
    found = set(checkpoint.tensors)
    faults = [f"{name} is missing" for name in sorted((wanted | scales) - found)]
    faults += [f"{name} was not asked for" for name in sorted(found - wanted - scales)]
    errors = {}
    for name in sorted(wanted & found):
        module = name.removesuffix(".weight")
        stored = precision if module in quantized_linears else SIXTEEN_BIT
        result = _compare(checkpoint, source, name, stored)
        if isinstance(result, str):
            faults.append(f"{name} {result}")
        elif module in quantized_linears:
            errors[module] = float(f"{result:.3g}")
    for name in sorted(scales & found):
        value = float(checkpoint.scalar(name))
        if not 0 < value < float("inf"):
            faults.append(f"{name} is {value}")
    if faults:
        raise CorruptError(
            f"the exported checkpoint is not a faithful copy of its source:{list_faults(faults)}"
        )
    kept = [name for name in source.spec.modules if name not in errors]
    return {"precision": precision.name, "relative_error": errors, "kept_16bit": kept}


def _compare(
    checkpoint: UnifiedCheckpoint, source: UnifiedCheckpoint, name: str, precision: QuantSpec
) -> str | float:
    """What is wrong with a tensor beside its source, or else its relative error."""
    import torch

    entry, origin = checkpoint.tensors[name], source.tensors[name]
    if entry.dtype != precision.weight_dtype:
        return f"has dtype {entry.dtype}, wanted {precision.weight_dtype}"
    if entry.shape != origin.shape:
        return f"has shape {entry.shape}, its source {origin.shape}"
    got, want = torch_view(checkpoint.read(name)), torch_view(source.read(name))
    if precision is SIXTEEN_BIT:
        if torch.equal(got.view(torch.int16), want.to(torch.bfloat16).view(torch.int16)):
            return 0.0
        return "differs from its source rounded to bfloat16"
    scale = float(checkpoint.scalar(f"{name}_scale"))
    beyond, lost, worst, error_norm, norm, nonzero = 0, 0, 0.0, 0.0, 0.0, 0
    chunks = (torch.split(tensor, _CHUNK_ROWS) for tensor in (got, want))
    for codes, rows in zip(*chunks, strict=True):
        weights, rounded = rows.float(), precision.dequantize(codes, scale)
        lost += int(((rounded == 0) & (weights != 0)).sum())
        nonzero += int((weights != 0).sum())
        norm += float(weights.square().sum())
        error = rounded.sub_(weights).abs_()
        error_norm += float(error.square().sum())
        allowed = weights.abs_().mul_(precision.relative_step)
        allowed = allowed.clamp_(min=scale * precision.absolute_step) * _SLACK
        outside = ~(error <= allowed)  # not >: a NaN is outside, too
        if outside.any():
            beyond += int(outside.sum())
            worst = max(worst, float((error / allowed).max()))
    if beyond:
        return (
            f"has {beyond} of {got.numel()} values beyond {precision.title} error, the worst by "
            f"{worst:.1f} x"
        )
    if lost > MAX_LOST_SHARE * max(nonzero, 1):
        return (
            f"lost {lost / nonzero:.0%} of its weights to zero ({MAX_LOST_SHARE:.0%} are allowed): "
            "a few of them are far larger than the rest; list it under quantizer.keep_16bit"
        )
    return float((error_norm / norm) ** 0.5 if norm else 0.0)
