"""Patterns that pick the linears which stay 16-bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from pipeline.core.errors import Fault
from pipeline.model.spec import ModelSpec


def select(patterns: Sequence[str], modules: Iterable[str]) -> tuple[str, ...]:
    """Names of the modules that match any pattern (fnmatch, case matters), in model order."""
    return tuple(
        name for name in modules if any(fnmatchcase(name, pattern) for pattern in patterns)
    )


def keep_16bit_faults(patterns: Sequence[str], spec: ModelSpec) -> list[Fault]:
    """Patterns that match nothing, and choices that split what every runtime fuses.

    vLLM refuses a mixture ("Detected some but not all shards of ... are quantized"); TensorRT-LLM
    stores q/k/v as one tensor.
    """
    faults = [
        Fault(
            f"quantizer.keep_16bit[{index}]",
            f"{pattern!r} matches no linear of this model; names look like "
            f"{next(iter(spec.modules))} (lm_head always stays 16-bit)",
        )
        for index, pattern in enumerate(patterns)
        if not select([pattern], spec.modules)
    ]
    for names in spec.fused_modules().values():
        kept = select(patterns, names)
        if kept and len(kept) < len(names):
            quantized = ", ".join(name for name in names if name not in kept)
            message = (
                f"{kept[0]} would stay 16-bit and {quantized} be quantized; runtimes merge them "
                "into one GEMM, which has one precision: keep all of them or none"
            )
            # One is enough: a pattern that splits one layer splits all of them.
            return [*faults, Fault("quantizer.keep_16bit", message)]
    return faults
