"""Checks every tensor of an exported FP8 checkpoint against the weights that it was made from.

An exporter can drop, empty or zero a tensor and still succeed; nothing later would notice before a
reader of nonsense does.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import CorruptError
from pipeline.quant.unified import UnifiedCheckpoint

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_RELATIVE_STEP = 2.0**-4
"""Half a unit in the last place of E4M3's three mantissa bits, relative to the value."""
_ABSOLUTE_STEP = 2.0**-10
"""Half of E4M3's smallest subnormal, 2^-9 (OCP 8-bit Floating Point Specification, table 1)."""
_SLACK = 1.04
"""An exporter that divides by the scale in bfloat16, as on a GPU, rounds by 2^-9 before it rounds
by 2^-4: 3 % more."""
_CHUNK_ROWS = 512
"""So that the intermediate values of a chunk stay in the processor's cache."""
_MAX_LISTED = 8


def verify_checkpoint(checkpoint_dir: Path, weights_dir: Path, quantized_linears: set[str]) -> None:
    """Compare an exported checkpoint with its source, tensor by tensor.

    Present, nothing extra, right shape and dtype, 16-bit tensors equal to the source rounded to
    bfloat16, dequantized FP8 weights within E4M3's rounding error, two KV-cache scales for each
    attention, all scales finite and positive.

    Args:
        checkpoint_dir: Unified FP8 checkpoint.
        weights_dir: Hugging Face folder that it was made from.
        quantized_linears: Modules that must be FP8; all others must not be.

    Raises:
        CorruptError: Lists what is wrong, by tensor.
    """
    checkpoint, source = UnifiedCheckpoint(checkpoint_dir), UnifiedCheckpoint(weights_dir)
    tied = bool(checkpoint.config_json.get("tie_word_embeddings", False))
    wanted = {name for name in source.tensors if not (tied and name == "lm_head.weight")}
    scales = {
        f"{module}.{kind}_scale" for module in quantized_linears for kind in ("weight", "input")
    }
    scales |= set(source.spec.kv_scales())
    found = set(checkpoint.tensors)
    faults = [f"{name} is missing" for name in sorted((wanted | scales) - found)]
    faults += [f"{name} was not asked for" for name in sorted(found - wanted - scales)]
    for name in sorted(wanted & found):
        fp8 = name.removesuffix(".weight") in quantized_linears
        fault = _tensor_fault(checkpoint, source, name, fp8=fp8)
        if fault:
            faults.append(f"{name} {fault}")
    for name in sorted(scales & found):
        value = float(checkpoint.scalar(name))
        if not 0 < value < float("inf"):
            faults.append(f"{name} is {value}")
    if faults:
        more = len(faults) - _MAX_LISTED
        listed = "\n".join(f"    {fault}" for fault in faults[:_MAX_LISTED])
        raise CorruptError(
            f"the exported checkpoint is not a faithful copy of its source:\n{listed}"
            + (f"\n    and {more} more" if more > 0 else "")
        )


def _tensor_fault(
    checkpoint: UnifiedCheckpoint, source: UnifiedCheckpoint, name: str, *, fp8: bool
) -> str | None:
    """What is wrong with one tensor, or None."""
    entry, origin = checkpoint.tensors[name], source.tensors[name]
    wanted_dtype = "float8_e4m3fn" if fp8 else "bfloat16"
    if entry.dtype != wanted_dtype:
        return f"has dtype {entry.dtype}, wanted {wanted_dtype}"
    if entry.shape != origin.shape:
        return f"has shape {entry.shape}, its source {origin.shape}"
    if entry.size_bytes == 0:
        return "is empty"
    got, want = _tensor(checkpoint.read(name)), _tensor(source.read(name))
    scale = float(checkpoint.scalar(f"{name}_scale")) if fp8 else 1.0
    for start in range(0, max(got.shape[0], 1), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        fault = (
            _fp8_fault(got[rows], want[rows], scale) if fp8 else _equal_fault(got[rows], want[rows])
        )
        if fault:
            return fault
    return None


def _fp8_fault(codes: torch.Tensor, want: torch.Tensor, scale: float) -> str | None:
    """Whether codes x scale lie within rounding error of the source."""
    source = want.float()
    error = (codes.float() * scale - source).abs_()
    allowed = (source.abs_() * _RELATIVE_STEP).clamp_(min=scale * _ABSOLUTE_STEP) * _SLACK
    beyond = int((~(error <= allowed)).sum())  # not >: a NaN is beyond, too
    if not beyond:
        return None
    worst = float((error / allowed).max())
    return f"has {beyond} of {error.numel()} values beyond FP8 error, the worst by {worst:.1f} x"


def _equal_fault(got: torch.Tensor, want: torch.Tensor) -> str | None:
    """Whether a 16-bit tensor is the source rounded to bfloat16, bit for bit."""
    import torch

    if torch.equal(got.view(torch.int16), want.to(torch.bfloat16).view(torch.int16)):
        return None
    return "differs from its source rounded to bfloat16"


def _tensor(values: NDArray[Any]) -> torch.Tensor:
    """A memory map as a tensor of the same memory: NumPy has no fast arithmetic on these types."""
    import numpy as np
    import torch

    dtype = getattr(torch, values.dtype.name)
    raw = values.view(np.dtype(f"u{values.dtype.itemsize}"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(raw).view(dtype)
