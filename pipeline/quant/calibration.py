"""What calibration saw: ranges that can be scales, outliers, and the scales of the KV cache."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from pipeline.core.errors import CorruptError
from pipeline.quant.spec import FP8_E4M3_MAX

OUTLIER_FACTOR = 50.0
"""An activation amax this many times the median of its kind is named in the record: SmolLM2's
three massive activations lie at 25 to 180 times theirs (measured 2026-11-24)."""


def check_amax(amax: Mapping[str, float]) -> list[str]:
    """Refuse amax values that cannot be scales; name the outliers among the activations.

    Args:
        amax: Quantizer name -> largest magnitude seen.

    Raises:
        CorruptError: NaN, infinite, zero or negative: the layer is named.
    """
    broken = {name: value for name, value in amax.items() if not 0 < value < math.inf}
    if broken:
        listed = ", ".join(f"{name} = {value}" for name, value in sorted(broken.items())[:8])
        raise CorruptError(
            f"calibration saw no usable range for {len(broken)} quantizers: {listed}; check the "
            "weights and the calibration text, or list the layers under quantizer.keep_16bit"
        )
    outliers = []
    by_kind: dict[str, list[float]] = {}
    for name, value in amax.items():
        by_kind.setdefault(_kind(name), []).append(value)
    for name, value in sorted(amax.items()):
        values = sorted(by_kind[_kind(name)])
        median = values[len(values) // 2]
        if "input" in name and value > OUTLIER_FACTOR * median:
            outliers.append(f"{name}: amax {value:.3g} is {value / median:.0f} x the median")
    return outliers


def cache_scales(amax: Mapping[str, float]) -> dict[str, float]:
    """Scales of the KV cache, amax / 448, by the tensor names that readers look for.

    The names are those of k_proj and v_proj, also where a model fuses both into `qkv_proj`
    (ModelOpt's unified checkpoint, 0.37 and 0.47).

    Args:
        amax: Quantizer name -> largest magnitude seen.
    """
    pattern = re.compile(r"(.*)\.([kv])_bmm_quantizer")
    found = {match: value for name, value in amax.items() if (match := pattern.fullmatch(name))}
    return {f"{m[1]}.{m[2]}_proj.{m[2]}_scale": value / FP8_E4M3_MAX for m, value in found.items()}


def _kind(name: str) -> str:
    """Layer numbers removed, so that like is compared with like."""
    return ".".join(part for part in name.split(".") if not part.isdigit())
