"""The known-bad table: a data file of conditions, so that a lesson costs a row and no code."""

from __future__ import annotations

import re
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.errors import Fault
from pipeline.core.settings import STRICT, Listed
from pipeline.formats.spec import format_specs
from pipeline.plan.request import PlanRequest
from pipeline.quant.spec import quant_specs

Severity = Literal["error", "warning", "note"]

_FACTS = frozenset({"cuda", "speculation", "weight_scales"})


@dataclass(frozen=True, kw_only=True, config=STRICT)
class When:
    """Conditions that must all hold; a condition on a fact that is not known does not hold.

    Attributes:
        architecture: Any of these.
        format: Any of these.
        precision: Any of these.
        kv_cache_dtype: Any of these.
        runtime: Name of the runtime, any of these.
        runtime_version_from: Version of the runtime, this or later; its pre-releases count.
        sm: Compute capability x 10 of the card, any of these.
        sm_below: Compute capability x 10 is lower.
        cuda: CUDA release (major.minor), any of these.
        cuda_below: CUDA release is earlier.
        speculation: Speculative decoding method, any of these.
        weight_scales: `tensor` or `block`, any of these.
        beyond_sliding_window: Whether `max_seq_len` exceeds the model's sliding window.
        beyond_original_context: Whether `max_seq_len` exceeds the context up to which a LongRoPE
            model's short factors hold.
    """

    architecture: Listed[str] | None = None
    format: Listed[str] | None = None
    precision: Listed[str] | None = None
    kv_cache_dtype: Listed[str] | None = None
    runtime: Listed[str] | None = None
    runtime_version_from: str | None = None
    sm: Listed[PositiveInt] | None = None
    sm_below: PositiveInt | None = None
    cuda: Listed[str] | None = None
    cuda_below: str | None = None
    speculation: Listed[str] | None = None
    weight_scales: Listed[str] | None = None
    beyond_sliding_window: bool | None = None
    beyond_original_context: bool | None = None

    def __post_init__(self) -> None:
        if all(condition is None for condition in asdict(self).values()):
            raise ValueError("a row without conditions would fire for every recipe")
        for field, known in (("format", format_specs()), ("precision", quant_specs())):
            if unknown := set(getattr(self, field) or ()) - set(known):
                raise ValueError(f"{field}: {sorted(unknown)} is none of {sorted(known)}")

    def holds(self, request: PlanRequest) -> bool:
        """Whether every condition holds for this request.

        Raises:
            ValueError: `request.facts` has a name that no condition knows.
        """
        if unknown := set(request.facts) - _FACTS:
            raise ValueError(f"unknown facts {sorted(unknown)}; known are {sorted(_FACTS)}")
        runtime, runtime_version = request.runtime
        cuda = _version(request.facts.get("cuda", ""))[:2]
        shape, context = request.shape, request.limits.max_seq_len
        any_of: list[tuple[tuple[Any, ...] | None, Any]] = [
            (self.architecture, request.shape.architecture),
            (self.format, request.format.name),
            (self.precision, request.precision.name),
            (self.kv_cache_dtype, request.limits.kv_cache_dtype),
            (self.runtime, runtime),
            (self.sm, request.target.sm),
            (self.cuda, ".".join(map(str, cuda))),
            (self.speculation, request.facts.get("speculation")),
            (self.weight_scales, request.facts.get("weight_scales", "tensor")),
        ]
        compared = [
            self.sm_below is None or request.target.sm < self.sm_below,
            self.cuda_below is None or (bool(cuda) and cuda < _version(self.cuda_below)),
            self.runtime_version_from is None
            or _version(runtime_version) >= _version(self.runtime_version_from),
            self.beyond_sliding_window in {None, _beyond(shape.window, context)},
            self.beyond_original_context in {None, _beyond(shape.short_rope_context, context)},
        ]
        return all(compared) and all(
            allowed is None or value in allowed for allowed, value in any_of
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KnownBad:
    """One row of the table; its fields are explained at the top of the data file."""

    id: str
    when: When
    severity: Severity
    path: str
    message: str
    source: str


def matching_rows(request: PlanRequest) -> tuple[KnownBad, ...]:
    """The rows whose conditions hold, in the order of the table."""
    return tuple(row for row in known_bad_table() if row.when.holds(request))


def checkpoint_faults(*, architecture: str, kv_cache_dtype: str) -> list[Fault]:
    """Errors of the table that hold for a checkpoint whatever the card and the runtime."""
    given = {"architecture": architecture, "kv_cache_dtype": kv_cache_dtype}
    faults = []
    for row in known_bad_table():
        conditions = {key: value for key, value in asdict(row.when).items() if value is not None}
        if row.severity != "error" or not conditions.keys() <= given.keys():
            continue
        if all(given[key] in allowed for key, allowed in conditions.items()):
            faults.append(Fault("kv_cache_dtype", f"{row.message} ({row.source})"))
    return faults


@cache
def known_bad_table() -> tuple[KnownBad, ...]:
    """The table that travels with the package.

    Raises:
        ValueError: See `parse_table`.
    """
    return parse_table(files("pipeline.plan").joinpath("known_bad.yaml").read_text("utf-8"))


def parse_table(text: str) -> tuple[KnownBad, ...]:
    """Read a table.

    Raises:
        ValueError: A row has an unknown key or condition, a wrong type, no condition, or the id of
            another. That is a bug of the table, not of the user.
    """
    import yaml  # 8 ms, and only whoever makes a plan needs it

    rows = tuple(KnownBad(**{**row, "when": When(**row["when"])}) for row in yaml.safe_load(text))
    ids = [row.id for row in rows]
    if len(set(ids)) < len(ids):
        raise ValueError(f"two rows share an id: {sorted(ids)}")
    return rows


def _beyond(edge: int | None, context: int) -> bool:
    return edge is not None and context > edge


def _version(text: str) -> tuple[int, ...]:
    """Release numbers of a version: `1.3.0rc15` -> (1, 3, 0). Nothing for an empty one."""
    release = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in release.group().split(".")) if release else ()
