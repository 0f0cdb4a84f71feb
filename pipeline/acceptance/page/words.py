"""Keys, values and figures of a report as people write them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_SPELLED = {
    "cpu": "CPU", "cpus": "CPUs", "cuda": "CUDA", "ecc": "ECC", "fp8": "FP8", "gemms": "GEMMs",
    "gpu": "GPU", "kv": "KV", "onnxruntime": "ONNX Runtime", "rtx": "RTX", "sm": "SM",
    "tensorrt": "TensorRT", "torch": "PyTorch", "transformers": "Transformers", "vllm": "vLLM",
}  # fmt: skip
DASH = "\u2013"
"""Stands for a figure that was not measured."""


def spoken(key: object) -> str:
    """A key of the report for people: `kv_cache_dtype` becomes `KV cache dtype`."""
    return " ".join(_SPELLED.get(word, word) for word in str(key).split("_"))


def shown(value: object) -> str:
    """Any plain value of the report for people."""
    if value is None or value == "":
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{spoken(key)} {shown(item)}" for key, item in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(shown(item) for item in value) or "none"
    return str(value)


def number(value: object, unit: str = "") -> str:
    """A measured figure with three to four digits; a dash if there is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return DASH
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size >= 1e7:
        text = f"{value:.3g}"
    elif size >= 1000:
        text = f"{value:,.0f}"
    elif size >= 10 or size == 0:
        text = f"{value:.1f}"
    else:
        text = f"{value:.3g}"
    return f"{text}\u00a0{unit}" if unit else text


def percent(value: float | None) -> str:
    """A share, or a dash."""
    return DASH if value is None else f"{value:.0%}"


def mebibytes(value: float | None, form: str = ".1f") -> str:
    """Bytes as MiB, or a dash."""
    return DASH if value is None else f"{value / 2**20:{form}} MiB".replace("-", "\u2212")
