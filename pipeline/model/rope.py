"""Rotary embedding: what `config.json` says about it, and the table that follows, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.model.config_keys import ConfigKeys

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's change of the frequencies: long waves slowed by `factor`, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (arXiv:2402.13753), as Phi-3 and Phi-4-mini use it.

    Attributes:
        short_factors: One divisor for each frequency, up to the original context.
        long_factors: The same beyond it.
        original_max_position_embeddings: Context that the model was first trained with, tokens.
        attention_factor: Multiplies cosine and sine.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float

    def factors(self, context: int) -> tuple[float, ...]:
        """The divisors for an engine whose requests are at most `context` tokens long."""
        beyond = context > self.original_max_position_embeddings
        return self.long_factors if beyond else self.short_factors


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding of a decoder.

    Attributes:
        theta: Base of the frequencies.
        rotary_dim: Leading elements of each head that are rotated; the rest passes unchanged.
        scaling: None for the plain embedding.
    """

    theta: float
    rotary_dim: int
    scaling: Llama3Scaling | LongRopeScaling | None = None

    @property
    def kind(self) -> Literal["default", "llama3", "longrope"]:
        """`rope_type` of config.json."""
        if self.scaling is None:
            return "default"
        return "llama3" if isinstance(self.scaling, Llama3Scaling) else "longrope"


def read_rope(keys: ConfigKeys, head_dim: int, max_position_embeddings: int) -> Rope:
    """Read the rope settings in either spelling (Transformers 4 and 5).

    What is wrong or not built becomes a fault of `keys`.
    """
    found = ConfigKeys(_settings(keys), "rope_parameters.")
    found.ignore(*_KNOWN)
    theta = found.number("rope_theta", 10000.0)
    partial = found.number("partial_rotary_factor", 1.0)
    kind = found.take("rope_type", "default")
    rotary_dim = int(head_dim * min(partial, 1.0))
    if not (keys.faults or found.faults) and (partial > 1 or rotary_dim < 2 or rotary_dim % 2):
        found.fault("partial_rotary_factor", f"{partial} of {head_dim} is no even size")
    scaling: Llama3Scaling | LongRopeScaling | None = None
    if kind == "llama3":
        scaling = _llama3_scaling(found)
    elif kind == "longrope":
        scaling = _longrope_scaling(found, max_position_embeddings, rotary_dim)
    elif kind != "default":
        found.fault("rope_type", f"{kind!r} is none of default, llama3, longrope")
    found.check_all_known()
    keys.faults += found.faults
    keys.read |= found.read
    return Rope(theta=theta, rotary_dim=rotary_dim, scaling=scaling)


_KNOWN = ("factor", "original_max_position_embeddings")
"""Settings that configs carry also where their kind of scaling does not read them."""


def _settings(keys: ConfigKeys) -> dict[str, Any]:
    """All rope settings, wherever the config states them; twice is fine, two values are not.

    Transformers 4 has `rope_scaling` beside `rope_theta`, and called its `rope_type` `type`;
    Transformers 5 has all in `rope_parameters`, and Phi-3 repeats its factor and its original
    context at the top level, where they take precedence.
    """
    top = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    keys.ignore(*top)
    found: dict[str, Any] = {}
    for section in (
        keys.section_of("rope_scaling"),
        keys.section_of("rope_parameters"),
        {key: keys.config[key] for key in top if key in keys.config},
    ):
        for stated, value in section.items():
            key = "rope_type" if stated == "type" else stated
            if value is None:
                continue
            kept = found.setdefault(key, value)
            if kept is not value and kept != value:
                message = f"is stated twice, as {kept!r} and as {value!r}"
                keys.fault(f"rope_parameters.{key}", message)
                return {}
    return found


def _llama3_scaling(found: ConfigKeys) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=found.number("factor"),
        low_freq_factor=found.number("low_freq_factor"),
        high_freq_factor=found.number("high_freq_factor"),
        original_max_position_embeddings=found.integer("original_max_position_embeddings"),
    )
    if not found.faults and not scaling.low_freq_factor < scaling.high_freq_factor:
        found.fault(
            "low_freq_factor",
            f"({scaling.low_freq_factor}) must be below high_freq_factor "
            f"({scaling.high_freq_factor})",
        )
    return scaling


def _longrope_scaling(
    found: ConfigKeys, max_position_embeddings: int, rotary_dim: int
) -> LongRopeScaling:
    """The factors, and the attention factor as Transformers computes it where none is stated."""
    original = found.integer("original_max_position_embeddings")
    short, long = found.numbers("short_factor"), found.numbers("long_factor")
    if not found.faults and not len(short) == len(long) == rotary_dim // 2:
        found.fault(
            "long_factor",
            f"longrope has {len(short)} short and {len(long)} long factors for "
            f"{rotary_dim // 2} frequencies",
        )
    ratio = found.number("factor", max_position_embeddings / original)
    return LongRopeScaling(
        short_factors=short,
        long_factors=long,
        original_max_position_embeddings=original,
        attention_factor=found.number("attention_factor", longrope_gain(ratio, original)),
    )


def longrope_gain(ratio: float, original: int) -> float:
    """LongRoPE's attention factor: sqrt(1 + ln(ratio) / ln(original)), 1 for a ratio up to 1.

    Args:
        ratio: Longest context over the original one (arXiv:2402.13753, section 3.3).
        original: Context that the model was first trained with, tokens.
    """
    return math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 < original else 1.0


def rope_tables(rope: Rope, *, context: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosine and sine, each [context, rotary_dim / 2].

    Row p, column i is the angle p * f_i (`rope_frequencies`). The graph pairs element i with
    i + rotary_dim / 2, as Hugging Face models do (`interleaved=0` of the ONNX operator), not with
    its neighbour as RoFormer does. LongRoPE multiplies both by its attention factor.
    """
    import numpy as np

    gain = rope.scaling.attention_factor if isinstance(rope.scaling, LongRopeScaling) else 1.0
    positions = np.arange(context, dtype=np.float64)
    angles = np.outer(positions, rope_frequencies(rope, context=context))
    return np.cos(angles) * gain, np.sin(angles) * gain


def rope_frequencies(rope: Rope, *, context: int) -> NDArray[np.float64]:
    """Radians that pair i turns from one token to the next, [rotary_dim / 2].

    theta^(-2i / rotary_dim) before scaling (RoFormer, arXiv:2104.09864, section 3.4.2).

    LongRoPE: Transformers picks the factors anew for each forward pass, by the longest row in it; a
    static graph picks them once, by its context, as vLLM does by `max_model_len`.
    """
    import numpy as np

    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim
    frequencies: NDArray[np.float64] = rope.theta**-exponents
    if isinstance(rope.scaling, Llama3Scaling):
        return _llama3(frequencies, rope.scaling)
    if isinstance(rope.scaling, LongRopeScaling):
        frequencies = frequencies / np.array(rope.scaling.factors(context))
    return frequencies


def _llama3(frequencies: NDArray[np.float64], scaling: Llama3Scaling) -> NDArray[np.float64]:
    """Divide the frequencies of long waves, keep the short ones, blend between.

    Source: `apply_scaling` in Meta's reference implementation of Llama 3.1; wavelengths are
    measured against the original context.
    """
    import numpy as np

    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    blended: NDArray[np.float64] = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return blended
