"""Workloads: how many requests at once or a second, how long their prompts and answers are.

A closed loop is a batch that starts together. An open loop (`request_rate`) is what users are: they
come whether or not the others have been answered, so a server that is too slow gets a queue, and
times count from each arrival. Which runner executes what is in `pipeline.runners.runner`.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, fields, replace
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from pydantic import Strict
from pydantic.dataclasses import dataclass

from pipeline.core.errors import Fault, RecipeError
from pipeline.core.settings import PathField
from pipeline.core.values import digest_of
from pipeline.runners.lengths import ITEM, Count, Lengths, Rate
from pipeline.runners.prompts_file import read_prompts, tokenized
from pipeline.runners.session import BatchOptions

Share = Annotated[float, Strict(), Gt(0), Le(1)]
Seed = Annotated[int, Strict(), Ge(0)]
Prompts = tuple[tuple[int, ...], ...]

_ISL_STREAM, _OSL_STREAM, _ARRIVAL_STREAM = 1, 2, 3
"""Second part of a random stream's name; see `Lengths.draw`."""


@dataclass(frozen=True, kw_only=True, config=ITEM)
class Workload:
    """Prompts of up to `isl` tokens and `osl` new ones each, `batch` of them at once.

    Attributes:
        name: Name in the report.
        batch: Requests at once: those that start together. With `request_rate` the most at once
            (vLLM's benchmark calls that max concurrency): one that arrives when so many run waits,
            and its waiting counts. So it is what the card's memory must hold in both.
        isl: Input sequence length, tokens: of every prompt, or of the longest where
            `isl_distribution` or `prompts_file` make them differ.
        osl: Output sequence length, tokens: of every request, or the most where `osl_distribution`
            or `ignore_eos: false` make them differ.
        min_output_tokens_per_s: Wanted rate of the whole batch; None to measure only.
        min_share_of_ceiling: The same as a share of what the card allows at this workload, by the
            plan: 0.65 stays right when the model or the card changes.
        requests: Requests of one run; None for one batch. Without `request_rate` a multiple of
            `batch`, in waves: the next batch starts when the last request of the one before has
            ended.
        request_rate: Requests that arrive a second, of a Poisson process; None for batches that
            start together. The first comes at 0, the last at (requests - 1) / request_rate.
        isl_distribution: Lengths of synthetic prompts; None for `isl` tokens each.
        osl_distribution: Output tokens of each request; None for `osl` each.
        ignore_eos: Whether every request generates all its output tokens. If not, an answer ends
            at any end-of-sequence id of the model, which counts as a token; for prompts that mean
            something, since synthetic ones end anywhere or nowhere.
        prompts_file: JSON lines (`pipeline.runners.prompts_file`), of which the first `requests`
            are taken; None for synthetic token ids.
        seed: Of synthetic prompts, drawn lengths and arrivals; None for the acceptance's.
        warm_ups: Runs that are discarded before the timed ones.
    """

    name: Annotated[str, Strict()]
    batch: Count
    isl: Count
    osl: Count
    min_output_tokens_per_s: Rate | None = None
    min_share_of_ceiling: Share | None = None
    requests: Count | None = None
    request_rate: Rate | None = None
    isl_distribution: Lengths | None = None
    osl_distribution: Lengths | None = None
    ignore_eos: Annotated[bool, Strict()] = True
    prompts_file: PathField | None = None
    seed: Seed | None = None
    warm_ups: Count = 1

    def __post_init__(self) -> None:
        if self.request_rate is not None:
            self._require_open_loop(self.request_rate)
        elif self.total_requests % self.batch:
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
        for drawn, key, longest_key, longest in (
            (lengths, "isl_distribution", "isl", self.isl),
            (self.osl_distribution, "osl_distribution", "osl", self.osl),
        ):
            if drawn is not None and (fault := drawn.fault(key, longest_key, longest)):
                raise ValueError(f"workload {self.name}: {fault}")
        if self.min_output_tokens_per_s is not None and self.min_share_of_ceiling is not None:
            raise ValueError(
                f"workload {self.name} has both min_output_tokens_per_s and min_share_of_ceiling; "
                "keep one of them"
            )

    def _require_open_loop(self, rate: float) -> None:
        """What must hold where requests arrive at a rate."""
        if self.requests is None or self.requests < 2:
            raise ValueError(
                f"workload {self.name}: request_rate needs requests, how many arrive in one run; "
                "2 or more, and enough that the run is many times as long as one request"
            )
        if self.min_share_of_ceiling is not None:
            raise ValueError(
                f"workload {self.name}: min_share_of_ceiling is a share of what a batch reaches "
                "that is always full; with request_rate use min_output_tokens_per_s"
            )
        wanted, brought = self.min_output_tokens_per_s, rate * self.osl
        if wanted is not None and wanted > brought:
            raise ValueError(
                f"workload {self.name}: request_rate x osl brings {brought:g} output tokens per "
                f"second at most, min_output_tokens_per_s is {wanted:g}; change one of them"
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
        """One batch of synthetic prompts and answers of equal length: what every runner can do."""
        return (
            self.total_requests == self.batch
            and self.isl_distribution is None
            and self.prompts_file is None
            and self.lengths_are_known_and_equal
            and self.request_rate is None
        )

    @property
    def lengths_are_known_and_equal(self) -> bool:
        """Every request generates `osl` tokens."""
        return self.osl_distribution is None and self.ignore_eos

    @property
    def load(self) -> dict[str, Any]:
        """The load itself, thresholds and name left out; of a file, its content.

        Raises:
            OSError: The file of prompts is not there; `faults` tells that in time.
        """
        found = asdict(self)
        thresholds = ("name", "min_output_tokens_per_s", "min_share_of_ceiling")
        load = {
            field.name: found[field.name]
            for field in fields(self)
            if field.name not in thresholds and found[field.name] != field.default
        }
        if self.total_requests == self.batch:
            load.pop("requests", None)
        if self.prompts_file is not None:
            content = load.pop("prompts_file").read_bytes()
            load["prompts_sha256"] = hashlib.sha256(content).hexdigest()
        return load

    @property
    def digest(self) -> str:
        """Identity of `load`. What is at its default is not in it."""
        return digest_of(self.load)

    def request_prompts(
        self, vocab_size: int, seed: int, tokenizer: Any | None = None, config_path: str = ""
    ) -> Prompts:
        """Token ids of all requests of one run, in their order.

        Synthetic ones are drawn: speed does not depend on what they mean.

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

        own = self._own(seed)
        count = self.total_requests
        drawn = np.random.default_rng(own).integers(0, vocab_size, (count, self.isl)).tolist()
        if self.isl_distribution is None:
            return tuple(tuple(row) for row in drawn)
        lengths = self.isl_distribution.draw(self.isl, count, (own, _ISL_STREAM))
        return tuple(tuple(row[:length]) for row, length in zip(drawn, lengths, strict=True))

    def output_lengths(self, seed: int) -> tuple[int, ...]:
        """Output tokens of each request of one run, at most; `seed` as in `request_prompts`."""
        count = self.total_requests
        if self.osl_distribution is None:
            return (self.osl,) * count
        stream = (self._own(seed), _OSL_STREAM)
        return tuple(self.osl_distribution.draw(self.osl, count, stream))

    def mean_isl(self, seed: int) -> float:
        """Mean prompt length of one run, tokens; of a file that is not read here, `isl`."""
        if self.isl_distribution is None:
            return float(self.isl)
        stream = (self._own(seed), _ISL_STREAM)
        drawn = self.isl_distribution.draw(self.isl, self.total_requests, stream)
        return sum(drawn) / len(drawn)

    def mean_osl(self, seed: int) -> float:
        """Mean of `output_lengths`; where end-of-sequence ends answers, their real mean is less."""
        drawn = self.output_lengths(seed)
        return sum(drawn) / len(drawn)

    def arrivals_s(self, seed: int) -> tuple[float, ...]:
        """When each request of one run arrives, seconds from the first; empty for batches.

        Gaps of a Poisson process are exponential. They are scaled so that the last arrives at
        (requests - 1) / request_rate: else the rate of a run of 100 would be off by a tenth
        (1 / sqrt(requests)), and nobody could say whether the server was.
        """
        if self.request_rate is None:
            return ()
        import numpy as np

        rng = np.random.default_rng((self._own(seed), _ARRIVAL_STREAM))
        at = np.cumsum(rng.exponential(1.0, self.total_requests - 1))
        scale = (self.total_requests - 1) / self.request_rate / float(at[-1])
        return (0.0, *(float(gap) * scale for gap in at))

    def waves(
        self, prompts: Prompts, seed: int, eos_token_ids: frozenset[int] = frozenset()
    ) -> tuple[tuple[list[list[int]], BatchOptions | None], ...]:
        """What a session is given, one call after the other: prompts, and what they ask beyond.

        Args:
            prompts: Of `request_prompts`.
            seed: The same.
            eos_token_ids: Of the model; used unless `ignore_eos`.

        Raises:
            RecipeError: End-of-sequence should end answers, and the model has no ids of it.
        """
        if not self.ignore_eos and not eos_token_ids:
            message = (
                f"workload {self.name} has ignore_eos: false, and neither generation_config.json "
                "nor the tokenizer has an end-of-sequence id; leave ignore_eos out"
            )
            raise RecipeError([Fault("", message)])
        each = self.output_lengths(seed)
        size = self.batch if self.request_rate is None else len(prompts)
        made = []
        for start in range(0, len(prompts), size):
            options = None
            if not self.lengths_are_known_and_equal or self.request_rate is not None:
                options = BatchOptions(
                    osl_each=each[start : start + size],
                    eos_token_ids=frozenset() if self.ignore_eos else eos_token_ids,
                    arrivals_s=self.arrivals_s(seed),
                    max_concurrency=None if self.request_rate is None else self.batch,
                )
            made.append(([list(prompt) for prompt in prompts[start : start + size]], options))
        return tuple(made)

    def _own(self, seed: int) -> int:
        return seed if self.seed is None else self.seed

    def faults(self, config_path: str, *, tokenizer: Any | None = None) -> tuple[Fault, ...]:
        """What is wrong with it that can be known without a model.

        Args:
            config_path: Of this workload, such as `acceptance.targets[0]`.
            tokenizer: Where it is there already; without it the length of a text is not known.
        """
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
        if whole and tokenizer is None and any(prompt.prompt for _, prompt in taken):
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
