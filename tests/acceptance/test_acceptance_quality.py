"""Quality figures against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.acceptance.quality import (
    KEPT_TOKENS,
    EngineFigures,
    SourceFigures,
    figures_against,
    load_figures,
    log_softmax,
    save_figures,
    source_figures,
    summarize_quality,
)
from pipeline.core.errors import CorruptError

WINDOWS = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 2, 2]], np.int64)
VOCAB = 4


def random_logits(seed: int, width: int = VOCAB) -> dict[tuple[int, ...], NDArray[np.float32]]:
    """Logits [4, vocab] of each window."""
    rng = np.random.default_rng(seed)
    return {tuple(w): rng.normal(size=(4, width)).astype(np.float32) * 3 for w in WINDOWS.tolist()}


def figures_of(logits: dict[tuple[int, ...], NDArray[np.float32]]) -> SourceFigures:
    return source_figures(lambda tokens: logits[tuple(tokens)], WINDOWS)[0]


def measure(
    engine: dict[tuple[int, ...], NDArray[np.float32]], source: SourceFigures
) -> EngineFigures:
    return figures_against(lambda tokens: engine[tuple(tokens)], WINDOWS, [source])[0]


def test_identical_logits_lose_nothing() -> None:
    logits = random_logits(0)
    source = figures_of(logits)
    quality = summarize_quality(source.nll, measure(logits, source), seed=0)
    assert quality["perplexity_change"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert quality["top1_agreement"]["value"] == 1.0
    assert abs(quality["mean_kl_nats"]["value"]) < 1e-3  # what float16 costs
    assert quality["tokens"] == 9


def test_figures_are_those_of_the_definition() -> None:
    half, quarter = math.log(0.5), math.log(0.25)
    certain = np.log(np.array([[0.5, 0.25, 0.125, 0.125]] * 4, np.float32))
    uniform = np.zeros((4, VOCAB), np.float32)
    windows = [tuple(window) for window in WINDOWS.tolist()]
    source = figures_of(dict.fromkeys(windows, certain))
    engine = measure(dict.fromkeys(windows, uniform), source)
    assert engine.nll == pytest.approx(np.full((3, 3), -quarter))
    # 0.5 ln(0.5/0.25) + 0.25 ln 1 + 2 x 0.125 ln(0.125/0.25) = 0.25 ln 2
    assert engine.kl == pytest.approx(np.full((3, 3), 0.25 * math.log(2)), abs=2e-3)
    # Next tokens of the first window: 1, 2, 3.
    assert source.nll[0] == pytest.approx([-quarter, -math.log(0.125), -math.log(0.125)])
    assert source.nll[1] == pytest.approx([-math.log(0.125), -quarter, -half])
    summary = summarize_quality(source.nll, engine, seed=0)
    assert summary["engine_perplexity"]["value"] == pytest.approx(4.0)
    mean = float(source.nll.mean())
    assert summary["source_perplexity"]["value"] == pytest.approx(math.exp(mean), abs=1e-5)
    change = 4.0 / math.exp(mean) - 1
    assert summary["perplexity_change"]["value"] == pytest.approx(change, abs=1e-5)


def test_agreement_counts_positions_with_the_same_top_token() -> None:
    logits = random_logits(1)
    source = figures_of(logits)
    other = {window: values.copy() for window, values in logits.items()}
    row = other[tuple(WINDOWS[0].tolist())][1]
    row[(row.argmax() + 1) % VOCAB] = row.max() + 1
    assert measure(other, source).agrees.sum() == 8


def test_divergence_of_many_tokens_is_that_of_the_kept_ones_and_one_class_for_the_rest() -> None:
    width = KEPT_TOKENS + 904
    source, engine = random_logits(5, width), random_logits(6, width)
    found = measure(engine, figures_of(source))
    window = tuple(WINDOWS[0].tolist())
    p = np.exp(log_softmax(source[window][:1])[0].astype(np.float64))
    q = np.exp(log_softmax(engine[window][:1])[0].astype(np.float64))
    order = np.argsort(-p)
    kept, rest = order[:KEPT_TOKENS], order[KEPT_TOKENS:]
    kl = (p[kept] * np.log(p[kept] / q[kept])).sum()
    kl += p[rest].sum() * np.log(p[rest].sum() / q[rest].sum())
    assert found.kl[0, 0] == pytest.approx(kl, rel=2e-3)
    assert kl <= (p * np.log(p / q)).sum()


def test_checkpoint_of_fewer_windows_is_compared_on_the_way_and_kept(tmp_path: Path) -> None:
    source, other = figures_of(random_logits(7)), random_logits(8)
    own, (beside,) = source_figures(lambda t: other[tuple(t)], WINDOWS[:2], "Checkpoint", [source])
    assert (beside.kl == measure(other, source).kl[:2]).all()
    save_figures(own, tmp_path)
    save_figures(beside, tmp_path, "beside-")
    assert (load_figures(EngineFigures, tmp_path, "beside-").kl == beside.kl).all()
    kept = load_figures(SourceFigures, tmp_path)
    both = figures_against(lambda t: other[tuple(t)], WINDOWS, [source, kept])
    assert [len(found.kl) for found in both] == [3, 2]
    assert np.abs(both[1].kl).max() < 1e-3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = random_logits(3)
    source = figures_of(logits)
    logits[tuple(WINDOWS[1].tolist())][0, 2] = value
    with pytest.raises(CorruptError, match="window 1 has logits that are not finite"):
        measure(logits, source)


def test_interval_holds_the_value_and_shrinks_with_more_windows() -> None:
    rng = np.random.default_rng(4)

    def interval(windows: int) -> dict[str, float]:
        nll = rng.normal(3, 1, (windows, 5)).astype(np.float32)
        engine = EngineFigures(
            nll=nll + rng.normal(0, 0.1, nll.shape).astype(np.float32),
            kl=np.zeros_like(nll),
            agrees=np.ones(nll.shape, np.bool_),
        )
        made: dict[str, float] = summarize_quality(nll, engine, seed=0)["perplexity_change"]
        assert made["low"] <= made["value"] <= made["high"]
        return made

    few, many = interval(10), interval(1000)
    assert 0 < many["high"] - many["low"] < (few["high"] - few["low"]) / 3
