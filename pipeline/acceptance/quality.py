"""Quality on held-out text: perplexity, KL divergence to the source, top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.core.errors import CorruptError
from pipeline.core.progress import progress

KEPT_TOKENS = 4096
"""Most likely tokens of a position whose log-probabilities are kept; all others are one class. The
KL of such classes is never above the whole one (log-sum inequality; Cover and Thomas, Elements of
Information Theory, theorem 2.7.1), and 150 MB hold what took 900 MB for SmolLM2; how much is lost
stands in docs/benchmarks.md."""
_LEAST_REST = 1e-7
BOOTSTRAP_DRAWS = 2000
"""Resamples behind each interval; 2000 fix the 95 % bounds to about a tenth of their width
(Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13: 1000 or more)."""


@dataclass(frozen=True, kw_only=True)
class SourceFigures:
    """What a model that others are compared with says about W windows of N tokens.

    K is `KEPT_TOKENS`, or the whole vocabulary where that is smaller.

    Attributes:
        ids: uint16 or int32 [W, N - 1, K], the most likely next tokens.
        logprobs: float16 [W, N - 1, K], theirs. Rounding to float16 moves a log-probability of -1
            by 0.0005 and the KL by about its square.
        rest: float32 [W, N - 1], log-probability of all other tokens together.
        nll: float32 [W, N - 1], negative log-likelihood of the actual next token, not rounded.
        top1: int32 [W, N - 1], most likely next token.
    """

    ids: NDArray[np.integer[Any]]
    logprobs: NDArray[np.float16]
    rest: NDArray[np.float32]
    nll: NDArray[np.float32]
    top1: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class EngineFigures:
    """An engine against another model, one value per position: [W, N - 1] each."""

    nll: NDArray[np.float32]
    kl: NDArray[np.float32]
    agrees: NDArray[np.bool_]


Figures = TypeVar("Figures", SourceFigures, EngineFigures)


def save_figures(figures: SourceFigures | EngineFigures, folder: Path, prefix: str = "") -> None:
    """Write each array into a file whose name starts with `prefix`."""
    for each in fields(figures):
        np.save(folder / f"{prefix}{each.name}.npy", getattr(figures, each.name))


def load_figures(kind: type[Figures], folder: Path, prefix: str = "") -> Figures:
    """What `save_figures` wrote."""
    return kind(**{one.name: np.load(folder / f"{prefix}{one.name}.npy") for one in fields(kind)})


Logits = Callable[[list[int]], NDArray[np.float32]]
"""Token ids of a window -> logits [N, V]."""


def source_figures(
    logits_of: Logits,
    windows: NDArray[np.int64],
    what: str = "Source",
    beside: Sequence[SourceFigures] = (),
) -> tuple[SourceFigures, tuple[EngineFigures, ...]]:
    """Run a model over the windows [W, N], and compare it with those `beside` on the way.

    CorruptError for a logit that is not finite; `what` names the model.
    """
    rows, engines = _figures(logits_of, windows, what, beside, keep=True)
    return _stack(SourceFigures, rows), engines


def figures_against(
    logits_of: Logits,
    windows: NDArray[np.int64],
    sources: Sequence[SourceFigures],
    what: str = "Engine",
) -> tuple[EngineFigures, ...]:
    """Run an engine over the windows, compared with others that may know the first of them only.

    KL is sum over tokens of p_source x (log p_source - log p_engine), in nats; see `KEPT_TOKENS`.
    """
    return _figures(logits_of, windows, what, sources, keep=False)[1]


Row = dict[str, NDArray[Any]]
"""One window of `SourceFigures` or `EngineFigures`, by its fields."""


def _figures(
    logits_of: Logits,
    windows: NDArray[np.int64],
    what: str,
    others: Sequence[SourceFigures],
    *,
    keep: bool,
) -> tuple[list[Row], tuple[EngineFigures, ...]]:
    """What a model says about each window, where that is kept, and how far it is from others."""
    own: list[Row] = []
    compared: list[list[Row]] = [[] for _ in others]
    with progress(what, len(windows), "windows") as done:
        for index, window in enumerate(windows):
            values = log_softmax(logits_of(window.tolist())[:-1], f"{what}: window {index}")
            nll, top1 = -values[np.arange(len(window) - 1), window[1:]], values.argmax(axis=-1)
            if keep:
                own.append({**_kept(values), "nll": nll, "top1": top1.astype(np.int32)})
            for other, rows in zip(others, compared, strict=True):
                if index < len(other.top1):
                    kl = divergence(other, index, values)
                    rows.append({"nll": nll, "kl": kl, "agrees": top1 == other.top1[index]})
            done(1)
    return own, tuple(_stack(EngineFigures, rows) for rows in compared)


def _stack(kind: type[Figures], rows: Sequence[Row]) -> Figures:
    return kind(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})


def _kept(values: NDArray[np.float32]) -> Row:
    vocab_size = values.shape[-1]
    kept = min(KEPT_TOKENS, vocab_size)
    # Unsorted, in a sixth of the time of `topk`.
    ids = np.argpartition(values, vocab_size - kept, axis=-1)[:, vocab_size - kept :]
    best = np.take_along_axis(values, ids, axis=-1)
    return {
        "ids": ids.astype(np.uint16 if vocab_size <= 1 << 16 else np.int32),
        # Below float16's range a token has no probability to speak of; -inf would be NaN in KL.
        "logprobs": np.maximum(best, -6e4).astype(np.float16),
        "rest": _rest(best),
    }


def _rest(kept: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probability [N - 1] of all tokens but the kept, [N - 1, K]; below the least is noise."""
    others = 1.0 - np.exp(kept.astype(np.float64)).sum(axis=-1)
    rest: NDArray[np.float32] = np.log(np.maximum(others, _LEAST_REST)).astype(np.float32)
    return rest


def divergence(
    source: SourceFigures, index: int, values: NDArray[np.float32]
) -> NDArray[np.float32]:
    """KL(source || other), nats [N - 1], of window `index`; `values` [N - 1, V]: of the other."""
    ids = source.ids[index].astype(np.int64)
    first, second = source.logprobs[index].astype(np.float32), np.take_along_axis(values, ids, -1)
    result: NDArray[np.float32] = (np.exp(first) * (first - second)).sum(axis=-1)
    rest = source.rest[index]
    result += np.exp(rest) * (rest - _rest(second))
    return result


def log_softmax(logits: NDArray[np.float32], what: str = "Engine") -> NDArray[np.float32]:
    """Log-probabilities over the last axis; a CorruptError names `what` if one is not finite."""
    if not np.isfinite(logits).all():
        raise CorruptError(
            f"{what} has logits that are not finite, so that quality cannot be measured: check the "
            "calibration's outliers and quantizer.keep_16bit"
        )
    result: NDArray[np.float32] = torch.from_numpy(logits).float().log_softmax(dim=-1).numpy()
    return result


def summarize_quality(
    source_nll: NDArray[np.float32], engine: EngineFigures, seed: int
) -> dict[str, Any]:
    """The report's `quality`: figures with 95 % bootstrap intervals over windows, pairwise."""
    source_means, engine_means = source_nll.mean(axis=1), engine.nll.mean(axis=1)
    return {
        "tokens": int(engine.nll.size),
        "windows": len(engine.nll),
        "source_perplexity": _interval(source_means, math.exp, seed),
        "engine_perplexity": _interval(engine_means, math.exp, seed),
        "perplexity_change": _interval(
            engine_means - source_means, lambda mean: math.exp(mean) - 1.0, seed
        ),
        **agreement(engine, seed),
    }


def agreement(engine: EngineFigures, seed: int) -> dict[str, Any]:
    """How far one model is from another, with 95 % bootstrap intervals over windows."""
    return {
        "mean_kl_nats": _interval(engine.kl.mean(axis=1), float, seed),
        "top1_agreement": _interval(engine.agrees.mean(axis=1), float, seed),
    }


def _interval(
    per_window: NDArray[Any], transform: Callable[[float], float], seed: int
) -> dict[str, float]:
    """Value and 95 % percentile interval of `transform(mean over windows)`."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(per_window), (BOOTSTRAP_DRAWS, len(per_window)))
    means = [transform(float(mean)) for mean in per_window[rows].mean(axis=1)]
    low, high = np.quantile(means, (0.025, 0.975))
    return {
        "value": round(float(transform(float(per_window.mean()))), 6),
        "low": round(float(low), 6),
        "high": round(float(high), 6),
    }
