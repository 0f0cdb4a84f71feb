"""Lengths of prompts and of answers that differ from request to request."""

from __future__ import annotations

from statistics import NormalDist
from typing import Annotated

from annotated_types import Gt
from pydantic import ConfigDict, Strict
from pydantic.dataclasses import dataclass

ITEM = ConfigDict(extra="forbid")
Count = Annotated[int, Strict(), Gt(0)]
Rate = Annotated[float, Strict(), Gt(0)]


@dataclass(frozen=True, kw_only=True, config=ITEM)
class Lengths:
    """How long prompts or answers are, from `min` to the workload's `isl` or `osl`, tokens.

    Attributes:
        min: The shortest.
        mean: Centre of a normal distribution that is cut off at `min` and the longest, so that the
            mean of what is drawn lies nearer to their middle; with `stdev`. Without both, every
            length is equally likely.
        stdev: Its standard deviation before it is cut off.
    """

    min: Count
    mean: Rate | None = None
    stdev: Rate | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.stdev is None):
            raise ValueError("a distribution's mean and stdev go together; give both or neither")

    def draw(self, longest: int, count: int, stream: tuple[int, int]) -> list[int]:
        """`count` lengths from `min` to `longest`; the same for the same stream.

        Args:
            longest: `isl` or `osl`.
            count: How many.
            stream: Seed, and what is drawn with it: each has random numbers of its own, or the
                lengths would follow the ids of the prompts.
        """
        import numpy as np

        rng = np.random.default_rng(stream)
        if self.mean is None or self.stdev is None:
            return [int(length) for length in rng.integers(self.min, longest + 1, count)]
        normal = NormalDist(self.mean, self.stdev)
        # By the inverse of the distribution: drawing again until it fits might never end.
        low, high = normal.cdf(self.min - 0.5), normal.cdf(longest + 0.5)
        shares = np.clip(rng.uniform(low, high, count), 1e-12, 1 - 1e-12)  # it has no end at 0
        lengths = (round(normal.inv_cdf(float(share))) for share in shares)
        return [min(max(length, self.min), longest) for length in lengths]

    def fault(self, key: str, longest_key: str, longest: int) -> str | None:
        """Why it does not fit below the longest; None when it does.

        Args:
            key: Name of the setting, for the message.
            longest_key: Name of the setting that has the longest.
            longest: Its value.
        """
        if self.min <= (self.mean or longest) <= longest:
            return None
        return (
            f"{key} must have min ({self.min}) <= mean ({self.mean}) <= {longest_key} ({longest})"
        )
