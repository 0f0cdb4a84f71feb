"""Medians and intervals of paired rounds."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.acceptance.race.ratios import DRAWS, median_interval, paired_ratio


def test_the_ratio_is_taken_within_each_round_so_that_drift_cancels() -> None:
    drift = np.linspace(1.0, 0.5, 10)  # the card gets slower and slower
    found = paired_ratio((300 * drift).tolist(), (200 * drift).tolist())
    assert found.median == pytest.approx(1.5)
    assert found.low == pytest.approx(1.5)
    assert found.high == pytest.approx(1.5)
    assert found.rounds == 10


def test_one_bad_round_moves_neither_the_median_nor_its_interval() -> None:
    assert paired_ratio([3.0, 3.0, 0.1, 3.0, 3.0], [2.0] * 5).median == 1.5
    assert median_interval([*[1.5] * 8, 90.0]) == (1.5, 1.5)


def test_fewer_than_three_rounds_have_no_interval() -> None:
    found = paired_ratio([3.0, 3.1], [2.0, 2.0])
    assert found.median == pytest.approx(1.525)
    assert (found.low, found.high) == (None, None)
    assert found.to_json()["low"] is None


def test_the_interval_of_three_rounds_is_their_range() -> None:
    assert median_interval([1.2, 1.0, 1.1]) == (1.0, 1.2)


def test_the_same_rounds_have_the_same_interval_and_order_does_not_matter() -> None:
    values = np.random.default_rng(1).normal(1.1, 0.02, 12).tolist()
    assert median_interval(values) == median_interval(values)
    low, high = median_interval(values)
    assert min(values) <= (low or 0) < float(np.median(values)) < (high or 0) <= max(values)


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    rng, covered, races = np.random.default_rng(3), 0, 200
    for _ in range(races):
        low, high = median_interval((1.3 + rng.normal(0, 0.05, 15)).tolist())
        covered += (low or 0) <= 1.3 <= (high or 0)
    # The bootstrap of a median of 15 is somewhat off 95 %; 88 to 99 % tell it from 50 and 100.
    assert 0.88 * races <= covered <= 0.99 * races
    assert DRAWS >= 2000


@pytest.mark.parametrize(
    ("ours", "peer"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0])]
)
def test_what_is_no_pair_of_rates_has_no_ratio(ours: list[float], peer: list[float]) -> None:
    with pytest.raises(ValueError, match="no pairs of positive rates"):
        paired_ratio(ours, peer)
