"""Quality on held-out text: perplexity, KL divergence to the source, top-1 agreement.

All three come from the logits of full windows, position by position. The source's own
log-probabilities are computed once and kept: an engine is always compared with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import CorruptError
from pipeline.core.progress import progress
from pipeline.runners.session import Session

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LOGPROBS, _NLL, _TOP1 = "logprobs.npy", "nll.npy", "top1.npy"
BOOTSTRAP_DRAWS = 2000
"""Resamples behind each interval; 2000 fix the 95 % bounds to about a tenth of their width
(Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13: 1000 or more)."""


@dataclass(frozen=True, kw_only=True)
class SourceFigures:
    """What the source model says about every window of N tokens, W windows, V vocabulary.

    Attributes:
        logprobs: float16 [W, N - 1, V] memory map. Rounding to float16 moves a log-probability of
            -1 by 0.0005 and the KL by about its square.
        nll: float32 [W, N - 1], negative log-likelihood of the actual next token, not rounded.
        top1: int32 [W, N - 1], most likely next token.
    """

    logprobs: NDArray[np.float16]
    nll: NDArray[np.float32]
    top1: NDArray[np.int32]


def read_source_figures(folder: Path) -> SourceFigures:
    """What `write_source_figures` wrote."""
    import numpy as np

    return SourceFigures(
        logprobs=np.load(folder / _LOGPROBS, mmap_mode="r"),
        nll=np.load(folder / _NLL),
        top1=np.load(folder / _TOP1),
    )


def write_source_figures(
    session: Session, windows: NDArray[np.int64], out: Path, what: str = "Source model"
) -> None:
    """Run a model that others are compared with over the windows [W, N]; `what` for progress."""
    import numpy as np

    logprobs = None
    nll: list[NDArray[np.float32]] = []
    top1: list[NDArray[np.int32]] = []
    with progress(what, len(windows), "windows") as done:
        for index, window in enumerate(windows):
            values = log_softmax(session.logits(window.tolist())[:-1])
            if logprobs is None:
                shape = (len(windows), *values.shape)
                logprobs = np.lib.format.open_memmap(
                    out / _LOGPROBS, mode="w+", dtype=np.float16, shape=shape
                )
            # Below float16's range a token has no probability to speak of; -inf would be NaN in KL.
            logprobs[index] = np.maximum(values, -6e4)
            nll.append(next_token_nll(values, window))
            top1.append(values.argmax(axis=-1).astype(np.int32))
            done(1)
    if logprobs is not None:
        logprobs.flush()
    np.save(out / _NLL, np.stack(nll))
    np.save(out / _TOP1, np.stack(top1))


@dataclass(frozen=True, kw_only=True)
class EngineFigures:
    """An engine against the source, one value per position: [W, N - 1] each."""

    nll: NDArray[np.float32]
    kl: NDArray[np.float32]
    agrees: NDArray[np.bool_]


def engine_figures(
    logits_of: Callable[[list[int]], NDArray[np.float32]],
    windows: NDArray[np.int64],
    source: SourceFigures,
) -> EngineFigures:
    """Run an engine over the windows and compare it with the source, position by position.

    KL is sum over tokens of p_source x (log p_source - log p_engine), in nats.

    Raises:
        CorruptError: A logit is not finite.
    """
    return figures_against(logits_of, windows, (source,))[0]


def figures_against(
    logits_of: Callable[[list[int]], NDArray[np.float32]],
    windows: NDArray[np.int64],
    sources: Sequence[SourceFigures],
) -> tuple[EngineFigures, ...]:
    """As `engine_figures`, against several models, of which each has these windows first.

    Raises:
        CorruptError: A logit is not finite.
    """
    import numpy as np

    found: list[list[_Window]] = [[] for _ in sources]
    with progress("Engine", len(windows), "windows") as done:
        for index, window in enumerate(windows):
            raw = logits_of(window.tolist())[:-1]
            if not np.isfinite(raw).all():
                raise CorruptError(
                    f"the engine gave logits that are not finite in window {index}; it cannot be "
                    "judged: check the calibration's outliers and quantizer.keep_16bit"
                )
            values = log_softmax(raw)
            nll, top1 = next_token_nll(values, window), values.argmax(axis=-1)
            for rows, source in zip(found, sources, strict=True):
                kl = divergence(source.logprobs[index], values)
                rows.append((nll, kl, top1 == source.top1[index]))
            done(1)
    return tuple(
        EngineFigures(
            nll=np.stack([nll for nll, _, _ in rows]),
            kl=np.stack([kl for _, kl, _ in rows]),
            agrees=np.stack([agrees for _, _, agrees in rows]),
        )
        for rows in found
    )


_Window = tuple["NDArray[np.float32]", "NDArray[np.float32]", "NDArray[np.bool_]"]
"""Negative log-likelihoods, divergences and agreements of one window."""


def divergence(logprobs: NDArray[np.float16], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """KL(first || second) of every position [N - 1], nats, of log-probabilities [N - 1, V]."""
    import numpy as np

    first = logprobs.astype(np.float32)
    result: NDArray[np.float32] = (np.exp(first) * (first - others)).sum(axis=-1)
    return result


def between(source: SourceFigures, other: SourceFigures) -> EngineFigures:
    """Compare two models whose figures are kept."""
    import numpy as np

    pairs = zip(source.logprobs, other.logprobs, strict=True)
    return EngineFigures(
        nll=other.nll,
        kl=np.stack([divergence(one, two.astype(np.float32)) for one, two in pairs]),
        agrees=other.top1 == source.top1,
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities over the last axis."""
    import torch

    result: NDArray[np.float32] = torch.from_numpy(logits).float().log_softmax(dim=-1).numpy()
    return result


def next_token_nll(logprobs: NDArray[np.float32], window: NDArray[np.int64]) -> NDArray[np.float32]:
    """Negative log-probability of the token that follows each position [N - 1]."""
    import numpy as np

    result: NDArray[np.float32] = -logprobs[np.arange(len(window) - 1), window[1:]]
    return result


def summarize_quality(
    source_nll: NDArray[np.float32], engine: EngineFigures, seed: int
) -> dict[str, Any]:
    """The report's `quality`: figures with 95 % bootstrap intervals over windows.

    Perplexity is exp of the mean negative log-likelihood. The change is paired: both models saw
    the same windows, so the interval of their ratio is far narrower than those of its parts.
    """
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
    import numpy as np

    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(per_window), (BOOTSTRAP_DRAWS, len(per_window)))
    low, high = np.quantile(_each(transform, per_window[rows].mean(axis=1)), (0.025, 0.975))
    return {
        "value": round(float(transform(float(per_window.mean()))), 6),
        "low": round(float(low), 6),
        "high": round(float(high), 6),
    }


def _each(transform: Callable[[float], float], values: Iterable[float]) -> list[float]:
    return [transform(float(value)) for value in values]
