"""The table of 256 codes against plain arithmetic."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pipeline.formats.trtllm.convert.write import added_error, requantization_table

CODES = np.arange(256, dtype=np.uint8)
VALUES = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float64)


@pytest.mark.parametrize("share", [1.0, 0.999, 0.7, 0.5, 0.3, 0.01, 1e-4])
def test_each_code_becomes_the_nearest_one(share: float) -> None:
    table = requantization_table(0.02 * share, 0.02)
    moved = VALUES[table]
    for value, found in zip(VALUES * share, moved, strict=True):
        if np.isnan(value):
            assert np.isnan(found)
        else:
            nearest = np.nanmin(np.abs(VALUES - value))
            assert abs(found - value) == pytest.approx(nearest, abs=1e-6 * abs(value) + 1e-12)


def test_equal_scales_change_nothing() -> None:
    assert (requantization_table(0.013, 0.013) == CODES).all()
    assert added_error(np.ones(256, np.int64), 0.013, 0.013) == 0.0


def test_half_the_scale_costs_nothing_but_in_the_smallest_numbers() -> None:
    counts = (np.abs(VALUES) >= 2.0**-5).astype(np.int64)
    assert added_error(counts, 0.01, 0.02) == 0.0
    assert added_error(1 - counts, 0.01, 0.02) > 0.0


def test_added_error_is_the_relative_norm_of_the_change() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 127, 5000, dtype=np.uint8)
    old = VALUES[codes] * 0.01
    new = VALUES[requantization_table(0.01, 0.013)[codes]] * 0.013
    counts = np.bincount(codes, minlength=256)
    expected = np.linalg.norm(new - old) / np.linalg.norm(old)
    assert added_error(counts, 0.01, 0.013) == pytest.approx(expected, rel=1e-9)


def test_tensor_of_zeros_has_no_error() -> None:
    counts = np.zeros(256, np.int64)
    counts[0] = 100
    assert added_error(counts, 0.01, 0.02) == 0.0
