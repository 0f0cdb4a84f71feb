"""A robust slope: Theil-Sen, the median of the slopes between all pairs of points.

It bears up to 29 % of stray points (Sen, "Estimates of the regression coefficient based on
Kendall's tau", JASA 63, 1968).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

MAX_POINTS = 240
"""28,680 pairs, some hundredths of a second. More points are thinned evenly, the first and the last
kept."""


def theil_sen_slope(points: Sequence[tuple[float, float]]) -> float:
    """Slope of y over x; two points or more, ordered by an x that grows.

    Raises:
        ValueError: No two points differ in x.
    """
    if len(points) > MAX_POINTS:
        step = (len(points) - 1) / (MAX_POINTS - 1)
        points = [points[round(index * step)] for index in range(MAX_POINTS)]
    slopes = [
        (later - earlier) / (x_later - x_earlier)
        for index, (x_earlier, earlier) in enumerate(points)
        for x_later, later in points[index + 1 :]
        if x_later != x_earlier
    ]
    if not slopes:
        raise ValueError("a slope needs two points that differ in x")
    return statistics.median(slopes)
