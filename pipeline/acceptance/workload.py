"""Workloads: how many requests at once, how long their prompts and answers are."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Le
from pydantic import ConfigDict, Strict
from pydantic.dataclasses import dataclass

from pipeline.stages import digest_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# An item of a YAML list has no `_target_`: pydantic makes it from the mapping, which its strict
# mode refuses for dataclasses. So the class is lax and every field strict.
_ITEM = ConfigDict(extra="forbid")
Count = Annotated[int, Strict(), Gt(0)]
Rate = Annotated[float, Strict(), Gt(0)]
Share = Annotated[float, Strict(), Gt(0), Le(1)]


@dataclass(frozen=True, kw_only=True, config=_ITEM)
class Workload:
    """A fixed batch that starts together: `batch` prompts of `isl` tokens, `osl` new ones each.

    Attributes:
        name: Name in the report.
        batch: Requests at once.
        isl: Input sequence length, tokens.
        osl: Output sequence length, tokens; end-of-sequence is ignored.
        min_output_tokens_per_s: Wanted rate of the whole batch; None to measure only.
        min_share_of_ceiling: The same as a share of what the card allows at this workload, by the
            plan: 0.65 stays right when the model or the card changes. For targets, not for a CPU.
        min_ratio_to_transformers: Wanted rate over that of Transformers on the same machine; None
            to report only. For CPU workloads.
    """

    name: Annotated[str, Strict()]
    batch: Count
    isl: Count
    osl: Count
    min_output_tokens_per_s: Rate | None = None
    min_share_of_ceiling: Share | None = None
    min_ratio_to_transformers: Rate | None = None

    def __post_init__(self) -> None:
        if self.min_output_tokens_per_s is not None and self.min_share_of_ceiling is not None:
            raise ValueError(
                f"workload {self.name} has both min_output_tokens_per_s and min_share_of_ceiling; "
                "keep one of them"
            )

    def with_rate(self, ceiling: float) -> Workload:
        """The same workload, its share replaced by the rate that it is of `ceiling` (tokens/s)."""
        if self.min_share_of_ceiling is None:
            return self
        rate = self.min_share_of_ceiling * ceiling
        return replace(self, min_output_tokens_per_s=rate, min_share_of_ceiling=None)

    @property
    def digest(self) -> str:
        """Identity of the load itself, thresholds left out."""
        return digest_of({"batch": self.batch, "isl": self.isl, "osl": self.osl})

    def prompts(self, vocab_size: int, seed: int) -> NDArray[np.int64]:
        """Synthetic token ids [batch, isl]: speed does not depend on what they mean."""
        import numpy as np

        drawn = np.random.default_rng(seed).integers(0, vocab_size, (self.batch, self.isl))
        return drawn.astype(np.int64)
