"""One weight scale for the tensors that every runtime fuses, set before rounding.

TensorRT-LLM and vLLM fuse q/k/v and gate/up into one matrix with one scale, and requantize the
parts whose scale differs. Rounding twice costs 12 to 35 % more weight error than rounding once
with the shared scale, which itself costs nothing (SmolLM2, measured 2026-11-24). So the weight
amax of each group becomes the group's maximum before anything is rounded.

Scales are also rounded up to a bfloat16 value: TensorRT-LLM casts them to 16 bits, and a scale
that is exact there means the same numbers in every runtime.
"""

from __future__ import annotations

from typing import Any

from pipeline.model.spec import ModelSpec


def bf16_scale_amax(amax: Any, code_max: float) -> Any:
    """The smallest amax at or above `amax` whose scale (amax / code_max) is exact in bfloat16."""
    import torch

    # In float64: a GPU's float32 division can land a last bit above an exact quotient.
    scale = amax.double() / code_max
    rounded = scale.to(torch.bfloat16)
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.double() >= scale, rounded, above).float() * code_max


def share_scales(model: Any, spec: ModelSpec, code_max: float) -> dict[str, tuple[str, ...]]:
    """Give each fused group one weight amax, and every amax a bfloat16-exact scale, in place.

    Args:
        model: A calibrated ModelOpt model, weights not yet rounded.
        spec: Says which modules runtimes fuse.
        code_max: Largest code of the precision.

    Returns:
        The groups that share.
    """
    import torch

    quantized = {
        name: module
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight_quantizer", None), "is_enabled", False)
    }
    groups = {
        label: names
        for label, names in spec.fused_modules().items()
        if quantized.keys() >= set(names)
    }
    for names in groups.values():
        shared = torch.stack([quantized[name].weight_quantizer.amax for name in names]).max()
        for name in names:
            _set_amax(quantized[name].weight_quantizer, shared)
    for module in quantized.values():
        for quantizer in (module.weight_quantizer, module.input_quantizer):
            if quantizer.is_enabled:
                _set_amax(quantizer, bf16_scale_amax(quantizer.amax, code_max))
    return groups


def _set_amax(quantizer: Any, value: Any) -> None:
    """Replace an amax by a float32 one.

    The quantizer's own setter copies into its buffer, which is bfloat16 in a bfloat16 model: too
    few bits for 448 times a bfloat16 scale.
    """
    if hasattr(quantizer, "_amax"):
        delattr(quantizer, "_amax")
    quantizer.amax = value.float().clone()
