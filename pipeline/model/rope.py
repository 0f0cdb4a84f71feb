"""Rotary embedding: its settings, and the table that follows, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

    Each frequency has a divisor up to the original context, with which the model was first trained,
    and another beyond it; `attention_factor` multiplies cosine and sine.
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


def longrope_gain(ratio: float, original: int) -> float:
    """LongRoPE's attention factor: sqrt(1 + ln(ratio) / ln(original)), 1 for a ratio up to 1.

    `ratio` is the longest context over the original one (arXiv:2402.13753, section 3.3).
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
