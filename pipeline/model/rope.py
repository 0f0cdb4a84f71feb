"""Rotary embedding: what `config.json` says about it, and the table that follows, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

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


def rope_of_config(config: Mapping[str, Any], *, theta: float, head_dim: int) -> Rope:
    """Read the rope settings in either spelling (Transformers 4 and 5).

    Raises:
        KeyError: A scaling lacks a key that it needs; the key is the argument.
        ValueError: The scaling is of a kind that we do not build, or contradicts itself.
    """
    found = _settings(config)
    kind = found.get("rope_type") or found.get("type") or "default"
    partial = found.get("partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(f"partial_rotary_factor {partial} of {head_dim} is no even size")
    scaling: Llama3Scaling | LongRopeScaling | None = None
    if kind == "llama3":
        scaling = _llama3_scaling(found)
    elif kind == "longrope":
        scaling = _longrope_scaling(found, config["max_position_embeddings"], rotary_dim)
    elif kind != "default":
        raise ValueError(f"rope_type {kind!r} is none of default, llama3, longrope")
    return Rope(theta=theta, rotary_dim=rotary_dim, scaling=scaling)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """All rope settings, wherever the config states them; twice is fine, two values are not.

    Transformers 4 has `rope_scaling` beside `rope_theta`; Transformers 5 has all in
    `rope_parameters`, and Phi-3 repeats its factor and its original context at the top level, where
    they take precedence.
    """
    top = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    sections: list[Mapping[str, Any]] = [
        config.get("rope_scaling") or {},
        config.get("rope_parameters") or {},
        {key: config[key] for key in top if key in config},
    ]
    found: dict[str, Any] = {}
    for section in sections:
        for key, value in section.items():
            if value is None:
                continue
            if found.setdefault(key, value) != value:
                raise ValueError(f"{key} is stated twice, as {found[key]} and as {value}")
    if len({found.get(key) for key in ("rope_type", "type")} - {None}) > 1:
        raise ValueError(f"type is {found['type']!r}, rope_type is {found['rope_type']!r}")
    return found


def _llama3_scaling(found: Mapping[str, Any]) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=float(found["factor"]),
        low_freq_factor=float(found["low_freq_factor"]),
        high_freq_factor=float(found["high_freq_factor"]),
        original_max_position_embeddings=int(found["original_max_position_embeddings"]),
    )
    if not scaling.low_freq_factor < scaling.high_freq_factor:
        raise ValueError(
            f"llama3 wants low_freq_factor ({scaling.low_freq_factor}) below high_freq_factor "
            f"({scaling.high_freq_factor})"
        )
    return scaling


def _longrope_scaling(
    found: Mapping[str, Any], max_position_embeddings: int, rotary_dim: int
) -> LongRopeScaling:
    """Factors and the attention factor, sqrt(1 + ln(f) / ln(original)) where none is stated.

    f is the ratio of the two contexts (arXiv:2402.13753, section 3.3, and Transformers' rope
    utilities).
    """
    original = int(found["original_max_position_embeddings"])
    short, long = tuple(map(float, found["short_factor"])), tuple(map(float, found["long_factor"]))
    if len(short) != rotary_dim // 2 or len(long) != rotary_dim // 2:
        raise ValueError(
            f"longrope has {len(short)} short and {len(long)} long factors for "
            f"{rotary_dim // 2} frequencies"
        )
    ratio = float(found.get("factor") or max_position_embeddings / original)
    attention = found.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    return LongRopeScaling(
        short_factors=short,
        long_factors=long,
        original_max_position_embeddings=original,
        attention_factor=float(attention),
    )


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
