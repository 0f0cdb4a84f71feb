"""Workloads: how many requests at once, how long their prompts and answers are.

What is not here is not executed, and so cannot be written: arrivals at a rate (an open loop),
output lengths that differ, and answers that end at end-of-sequence. Each of them needs a runtime
that is served while it runs; the sessions of `pipeline.runners` take a batch and give it back.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict, Strict
from pydantic.dataclasses import dataclass

from pipeline.acceptance.prompts_file import file_sha256, read_prompts, tokenized
from pipeline.errors import Fault, RecipeError
from pipeline.settings import PathField
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


Seed = Annotated[int, Strict(), Ge(0)]
Prompts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, config=_ITEM)
class PromptLengths:
    """How long synthetic prompts are, from `min` to the workload's `isl`, tokens.

    Attributes:
        min: The shortest.
        mean: Centre of a normal distribution that is cut off at `min` and `isl`, so that the mean
            of what is drawn lies nearer to their middle; with `stdev`. Without both, every length
            is equally likely.
        stdev: Its standard deviation before it is cut off.
    """

    min: Count
    mean: Rate | None = None
    stdev: Rate | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.stdev is None):
            raise ValueError("isl_distribution: mean and stdev go together; give both or neither")

    def draw(self, longest: int, count: int, seed: int) -> list[int]:
        """`count` lengths from `min` to `longest`; the same for the same seed."""
        import numpy as np

        # A stream of its own, or the lengths would follow the ids of the prompts.
        rng = np.random.default_rng([seed, 1])
        if self.mean is None or self.stdev is None:
            return [int(length) for length in rng.integers(self.min, longest + 1, count)]
        normal = NormalDist(self.mean, self.stdev)
        # By the inverse of the distribution: drawing again until it fits might never end.
        low, high = normal.cdf(self.min - 0.5), normal.cdf(longest + 0.5)
        shares = np.clip(rng.uniform(low, high, count), 1e-12, 1 - 1e-12)  # it has no end at 0
        lengths = (round(normal.inv_cdf(float(share))) for share in shares)
        return [min(max(length, self.min), longest) for length in lengths]


@dataclass(frozen=True, kw_only=True, config=_ITEM)
class Workload:
    """Batches that start together: `batch` prompts of up to `isl` tokens, `osl` new ones each.

    Attributes:
        name: Name in the report.
        batch: Requests at once.
        isl: Input sequence length, tokens: of every prompt, or of the longest where
            `isl_distribution` or `prompts_file` make them differ.
        osl: Output sequence length of every request, tokens; end-of-sequence is ignored.
        min_output_tokens_per_s: Wanted rate of the whole batch; None to measure only.
        min_share_of_ceiling: The same as a share of what the card allows at this workload, by the
            plan: 0.65 stays right when the model or the card changes. For targets, not for a CPU.
        min_ratio_to_transformers: Wanted rate over that of Transformers on the same machine; None
            to report only. For CPU workloads.
        requests: Requests of one run, a multiple of `batch`; None for one batch. They run in waves:
            the next batch starts when the last request of the one before has ended.
        isl_distribution: Lengths of synthetic prompts; None for `isl` tokens each.
        prompts_file: JSON lines (`pipeline.acceptance.prompts_file`), of which the first `requests`
            are taken; None for synthetic token ids.
        seed: Of synthetic prompts; None for the acceptance's.
        warm_ups: Runs that are discarded before the timed ones.
    """

    name: Annotated[str, Strict()]
    batch: Count
    isl: Count
    osl: Count
    min_output_tokens_per_s: Rate | None = None
    min_share_of_ceiling: Share | None = None
    min_ratio_to_transformers: Rate | None = None
    requests: Count | None = None
    isl_distribution: PromptLengths | None = None
    prompts_file: PathField | None = None
    seed: Seed | None = None
    warm_ups: Count = 1

    def __post_init__(self) -> None:
        if self.total_requests % self.batch:
            raise ValueError(
                f"workload {self.name}: requests ({self.requests}) must be a multiple of batch "
                f"({self.batch}): a wave that is not full would count as one that is"
            )
        lengths = self.isl_distribution
        if lengths is not None and self.prompts_file is not None:
            raise ValueError(
                f"workload {self.name} has both isl_distribution and prompts_file; the file's "
                "prompts have lengths of their own, keep one of them"
            )
        if lengths is not None and not lengths.min <= (lengths.mean or self.isl) <= self.isl:
            raise ValueError(
                f"workload {self.name}: isl_distribution must have min ({lengths.min}) <= mean "
                f"({lengths.mean}) <= isl ({self.isl})"
            )
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
    def total_requests(self) -> int:
        """Requests of one run, all waves together."""
        return self.requests or self.batch

    @property
    def is_plain(self) -> bool:
        """One batch of synthetic prompts of equal length: what every runner can execute."""
        return (
            self.total_requests == self.batch
            and self.isl_distribution is None
            and self.prompts_file is None
        )

    @property
    def load(self) -> dict[str, Any]:
        """The load itself, thresholds and name left out; of a file, its content.

        Raises:
            OSError: The file of prompts is not there; `faults` tells that in time.
        """
        load: dict[str, Any] = {"batch": self.batch, "isl": self.isl, "osl": self.osl}
        if self.total_requests != self.batch:
            load["requests"] = self.requests
        if self.isl_distribution is not None:
            load["isl_distribution"] = asdict(self.isl_distribution)
        if self.prompts_file is not None:
            load["prompts_sha256"] = file_sha256(self.prompts_file)
        if self.seed is not None:
            load["seed"] = self.seed
        if self.warm_ups != 1:
            load["warm_ups"] = self.warm_ups
        return load

    @property
    def digest(self) -> str:
        """Identity of `load`. What is at its default is not in it."""
        return digest_of(self.load)

    def prompts(self, vocab_size: int, seed: int) -> NDArray[np.int64]:
        """Synthetic token ids [batch, isl]: speed does not depend on what they mean.

        Raises:
            RecipeError: The workload is more than that; who executes it takes `request_prompts`.
        """
        import numpy as np

        if not self.is_plain:
            message = (
                f"workload {self.name}: this runner executes one batch of synthetic prompts of "
                "equal length; leave requests, isl_distribution and prompts_file out"
            )
            raise RecipeError([Fault("", message)])
        return np.array(self.request_prompts(vocab_size, seed), np.int64)

    def request_prompts(
        self, vocab_size: int, seed: int, tokenizer: Any | None = None, config_path: str = ""
    ) -> Prompts:
        """Token ids of all requests of one run, in their order.

        Args:
            vocab_size: Ids are below it.
            seed: Of synthetic prompts, where the workload has none of its own.
            tokenizer: For a file whose prompts are text.
            config_path: Of this workload, for messages.

        Raises:
            RecipeError: The file of prompts does not fit, or has text and there is no tokenizer.
        """
        if self.prompts_file is not None:
            return self._file_prompts(vocab_size, tokenizer, config_path, whole=True)
        import numpy as np

        own = seed if self.seed is None else self.seed
        count = self.total_requests
        drawn = np.random.default_rng(own).integers(0, vocab_size, (count, self.isl)).tolist()
        if self.isl_distribution is None:
            return tuple(tuple(row) for row in drawn)
        lengths = self.isl_distribution.draw(self.isl, count, own)
        return tuple(tuple(row[:length]) for row, length in zip(drawn, lengths, strict=True))

    def faults(
        self, config_path: str, *, equal_lengths: bool = False, tokenizer: Any | None = None
    ) -> tuple[Fault, ...]:
        """What is wrong with it that can be known without a model.

        Args:
            config_path: Of this workload, such as `acceptance.targets[0]`.
            equal_lengths: Whether something that executes it takes equally long prompts only, as
                Transformers does, the baseline of `cpu_workloads`.
            tokenizer: Where it is there already; without it the length of a text is not known.
        """
        if equal_lengths and (self.prompts_file is not None or self.isl_distribution is not None):
            message = (
                "Transformers, the baseline on a CPU, times prompts of equal length only; leave "
                "prompts_file and isl_distribution out, or make it one of acceptance.targets"
            )
            return (Fault(config_path, message),)
        if self.prompts_file is None:
            return ()
        try:
            self._file_prompts(None, tokenizer, config_path, whole=False)
        except RecipeError as error:
            return error.faults
        return ()

    def _file_prompts(
        self, vocab_size: int | None, tokenizer: Any | None, config_path: str, *, whole: bool
    ) -> Prompts:
        """The file's prompts; `whole`: text that cannot be tokenized is a fault."""
        assert self.prompts_file is not None
        path = f"{config_path}.prompts_file".lstrip(".")
        found = read_prompts(self.prompts_file, path)
        if len(found) < self.total_requests:
            message = (
                f"{self.prompts_file} has {len(found)} prompts, the workload {self.name} has "
                f"{self.total_requests} requests; add prompts, or lower requests or batch"
            )
            raise RecipeError([Fault(path, message)])
        taken = found[: self.total_requests]
        if whole and tokenizer is None and any(prompt.text for prompt in taken):
            message = f"{self.prompts_file} has text, and this runner has no tokenizer for it"
            raise RecipeError([Fault(path, f"{message}; use token_ids")])
        return tokenized(
            taken,
            self.prompts_file,
            path,
            isl=self.isl,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
        )
