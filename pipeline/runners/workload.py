"""Workloads: how many requests at once or a second, how long their prompts and answers are.

A closed loop is a batch that starts together. An open loop (`request_rate`) is what users are: they
come whether or not the others have been answered, so a server that is too slow gets a queue, and
times count from each arrival. Which runner executes what is in `pipeline.runners.runner`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Annotated, Any

from annotated_types import Ge, MinLen
from pydantic import ConfigDict, NonNegativeInt, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pipeline.core.errors import CorruptError, Fault, RecipeError
from pipeline.core.published import digest_of
from pipeline.core.settings import PathField, read_json_object
from pipeline.model.hf import chat_ids
from pipeline.plan.sizes import Count, PlannedWorkload, Rate

_ITEM = ConfigDict(extra="forbid")
Seed = Annotated[int, Strict(), Ge(0)]
Prompts = tuple[tuple[int, ...], ...]

_ISL_STREAM, _OSL_STREAM, _ARRIVAL_STREAM = 1, 2, 3
"""Second part of a random stream's name; see `Lengths.draw`."""


@dataclass(frozen=True, kw_only=True, config=_ITEM)
class Lengths:
    """How long prompts or answers are, from `min` to the workload's `isl` or `osl`, tokens.

    `mean` and `stdev` are of a normal distribution before it is cut off at both ends, so what is
    drawn has a mean nearer to their middle; without them every length is equally likely.
    """

    min: Count
    mean: Rate | None = None
    stdev: Rate | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.stdev is None):
            raise ValueError("a distribution's mean and stdev go together; give both or neither")

    def draw(self, longest: int, count: int, stream: tuple[int, int]) -> list[int]:
        """`count` lengths from `min` to `longest`; `stream` is a seed and what is drawn with it."""
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


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """What a batch asks beyond its prompts and the longest answer.

    Attributes:
        osl_each: Most output tokens of each request.
        eos_token_ids: Each ends an answer, as its last token; empty to ignore them all.
        arrivals_s: When each request arrives after the start; empty for all at once.
        max_concurrency: Most at once where they arrive; None for no bound.
    """

    osl_each: tuple[int, ...]
    eos_token_ids: frozenset[int] = frozenset()
    arrivals_s: tuple[float, ...] = ()
    max_concurrency: int | None = None


@dataclass(frozen=True, kw_only=True, config=_ITEM)
class Workload(PlannedWorkload):
    """Prompts of up to `isl` tokens and `osl` new ones each, `batch` of them at once.

    `batch` are those that start together, with `request_rate` the most at once (vLLM's benchmark
    calls that max concurrency): one that arrives when so many run waits, and its waiting counts.

    Attributes:
        requests: Of one run; None for one batch. Without `request_rate` a multiple of `batch`, in
            waves: the next starts when the last request of the one before has ended.
        request_rate: Requests that arrive a second, of a Poisson process; None for batches that
            start together. The first comes at 0, the last at (requests - 1) / request_rate.
        ignore_eos: Whether every request generates all its output tokens; else any end-of-sequence
            id ends an answer, as its last token.
        prompts_file: JSON lines (`FilePrompt`), the first `requests` of them; None
            for synthetic token ids.
        seed: Of synthetic prompts, drawn lengths and arrivals; None for the acceptance's.
        warm_ups: Runs that are discarded before the timed ones.
    """

    requests: Count | None = None
    request_rate: Rate | None = None
    isl_distribution: Lengths | None = None
    osl_distribution: Lengths | None = None
    ignore_eos: Annotated[bool, Strict()] = True
    prompts_file: PathField | None = None
    seed: Seed | None = None
    warm_ups: Count = 1

    def __post_init__(self) -> None:
        for fault in self._own_faults():
            raise ValueError(f"workload {self.name}{fault}")

    def _own_faults(self) -> Iterator[str]:
        """What is wrong whatever the model is; each goes on after the name."""
        if self.request_rate is not None:
            yield from self._open_loop_faults(self.request_rate)
        elif self.total_requests % self.batch:
            yield f": requests ({self.requests}) must be a multiple of batch ({self.batch})"
        if self.isl_distribution is not None and self.prompts_file is not None:
            yield " has both isl_distribution and prompts_file; keep one of them"
        for drawn, key, longest in (
            (self.isl_distribution, "isl", self.isl),
            (self.osl_distribution, "osl", self.osl),
        ):
            if drawn is not None and not drawn.min <= (drawn.mean or longest) <= longest:
                wanted = f"min ({drawn.min}) <= mean ({drawn.mean}) <= {key} ({longest})"
                yield f": {key}_distribution must have {wanted}"
        if self.min_output_tokens_per_s is not None and self.min_share_of_ceiling is not None:
            yield " has both min_output_tokens_per_s and min_share_of_ceiling; keep one of them"

    def _open_loop_faults(self, rate: float) -> Iterator[str]:
        if self.requests is None or self.requests < 2:
            yield ": request_rate needs requests, how many arrive in one run: many, at least 2"
        if self.min_share_of_ceiling is not None:
            yield ": with request_rate use min_output_tokens_per_s: a share is of full batches"
        wanted, brought = self.min_output_tokens_per_s, rate * self.osl
        if wanted is not None and wanted > brought:
            most = f"request_rate x osl brings {brought:g} output tokens per second at most"
            yield f": {most}, min_output_tokens_per_s is {wanted:g}; change one of them"

    def with_rate(self, ceiling: float) -> Workload:
        """The same workload, its share replaced by the rate that it is of `ceiling` (tokens/s)."""
        if self.min_share_of_ceiling is None:
            return self
        rate = self.min_share_of_ceiling * ceiling
        return replace(self, min_output_tokens_per_s=rate, min_share_of_ceiling=None)

    @property
    def total_requests(self) -> int:
        return self.requests or self.batch

    @property
    def needs(self) -> tuple[str, ...]:
        """Its keys that ask beyond one batch of equal requests: abilities of a runner."""
        asked = {
            "requests": self.request_rate is None and self.total_requests != self.batch,
            "isl_distribution": self.isl_distribution,
            "prompts_file": self.prompts_file,
            "osl_distribution": self.osl_distribution,
            "ignore_eos": not self.ignore_eos,
            "request_rate": self.request_rate,
        }
        return tuple(ability for ability, wanted in asked.items() if wanted)

    @property
    def lengths_are_known_and_equal(self) -> bool:
        return self.osl_distribution is None and self.ignore_eos

    @property
    def load(self) -> dict[str, Any]:
        """The load itself, thresholds, name and defaults left out; of a file, its content."""
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
        return digest_of(self.load)

    def request_prompts(self, vocab_size: int, seed: int, tokenizer: Any | None = None) -> Prompts:
        """Token ids of all requests of one run, in their order, below `vocab_size`.

        A file of prompts needs the `tokenizer`; RecipeError if it does not fit.
        """
        if self.prompts_file is not None:
            return self._file_prompts(vocab_size, tokenizer, "prompts_file")
        import numpy as np

        shape, own = (self.total_requests, self.isl), self._own(seed)
        drawn = np.random.default_rng(own).integers(0, vocab_size, shape).tolist()
        lengths = self._draw(self.isl_distribution, self.isl, seed, _ISL_STREAM)
        return tuple(tuple(row[:length]) for row, length in zip(drawn, lengths, strict=True))

    def output_lengths(self, seed: int) -> tuple[int, ...]:
        """Output tokens of each request of one run, at most."""
        return self._draw(self.osl_distribution, self.osl, seed, _OSL_STREAM)

    def mean_isl(self, seed: int) -> float:
        """Mean prompt length of one run, tokens; of a file that is not read here, `isl`."""
        return fmean(self._draw(self.isl_distribution, self.isl, seed, _ISL_STREAM))

    def mean_osl(self, seed: int) -> float:
        """Mean of `output_lengths`; where end-of-sequence ends answers, their real mean is less."""
        return fmean(self.output_lengths(seed))

    def _draw(
        self, lengths: Lengths | None, longest: int, seed: int, stream: int
    ) -> tuple[int, ...]:
        count = self.total_requests
        if lengths is None:
            return (longest,) * count
        return tuple(lengths.draw(longest, count, (self._own(seed), stream)))

    def arrivals_s(self, seed: int) -> tuple[float, ...]:
        """When each request of one run arrives, seconds from the first; empty for batches.

        Exponential gaps, scaled so that the last arrives at (requests - 1) / request_rate: else the
        rate of a run of 100 would be off by a tenth (1 / sqrt(requests)).
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

        RecipeError if end-of-sequence should end answers, and the model has no ids of it.
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

    def faults(self, config_path: str) -> tuple[Fault, ...]:
        """What is wrong with its file; the length of a text is not known yet."""
        try:
            if self.prompts_file is not None:
                self._file_prompts(None, None, f"{config_path}.prompts_file")
        except RecipeError as error:
            return error.faults
        return ()

    def _file_prompts(self, vocab_size: int | None, tokenizer: Any, config_path: str) -> Prompts:
        """The first prompts of the file; texts are skipped without a tokenizer.

        RecipeError, at `config_path`, if the file is none, has too few prompts, or some that are
        too long, empty or not below `vocab_size`: with all of them.
        """
        assert self.prompts_file is not None
        path, count, made = self.prompts_file, self.total_requests, []
        try:
            found = list(read_prompts(path))
        except ValueError as error:
            raise RecipeError([Fault(config_path, f"{path}: {error}")]) from error
        faults = []
        if len(found) < count:
            few = f"{path} has {len(found)} prompts, the workload {self.name} has {count} requests"
            faults.append(f"{few}; add prompts, or lower requests or batch")
        for line, prompt in found[:count]:
            if prompt.token_ids is None and tokenizer is None:
                continue
            ids = prompt.token_ids or tuple(tokenizer(prompt.prompt)["input_ids"])
            where = f"{path} line {line}"
            if not 1 <= len(ids) <= self.isl:
                faults.append(f"{where} has {len(ids)} tokens, isl allows 1 to {self.isl}")
            elif vocab_size is not None and max(ids) >= vocab_size:
                end = f"the vocabulary ends at {vocab_size}"
                faults.append(f"{where} has token id {max(ids)}, {end}")
            made.append(ids)
        if faults:
            raise RecipeError([Fault(config_path, message) for message in faults])
        return tuple(made)


_WANTED = 'wanted {"prompt": "text"} or {"token_ids": [1, 2, 3]}'


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class FilePrompt:
    """One JSON line of a file: ids, or text that gets special tokens, and no chat template."""

    prompt: Annotated[str, MinLen(1)] | None = None
    token_ids: Annotated[tuple[NonNegativeInt, ...], MinLen(1)] | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.token_ids is None):
            raise ValueError("it has both keys or none")


_LINE = TypeAdapter(FilePrompt)


def read_prompts(path: Path) -> Iterator[tuple[int, FilePrompt]]:
    """All prompts of a file with the numbers of their lines; a ValueError tells what is none."""
    try:
        # Not splitlines: it also splits at U+2028, which JSON allows inside a string.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, _LINE.validate_json(line)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                at = ".".join(["", *map(str, first["loc"])])
                raise ValueError(f"line {number}{at}: {first['msg']}; {_WANTED}") from error


def chat_prompt(tokenizer: Any, message: str) -> list[int]:
    """Token ids of one user message in the chat template, up to where the answer starts.

    A tokenizer without a template gets the plain text.
    """
    if not tokenizer.chat_template:
        plain: list[int] = tokenizer(message)["input_ids"]
        return plain
    ids = chat_ids(tokenizer, [{"role": "user", "content": message}])
    if ids is None:
        raise CorruptError(f"{tokenizer.name_or_path}: its chat template refuses a plain message")
    return list(ids)


def eos_ids(tokenizer: Any) -> frozenset[int]:
    """Every id that ends an answer: those of `generation_config.json`, else the tokenizer's."""
    path = Path(tokenizer.name_or_path) / "generation_config.json"
    declared = read_json_object(path).get("eos_token_id") if path.is_file() else None
    if declared is None:
        declared = tokenizer.eos_token_id
    ids = declared if isinstance(declared, list) else [declared]
    return frozenset(one for one in ids if one is not None)
