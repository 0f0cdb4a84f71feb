"""The known-bad table: a data file of conditions, so that a lesson costs a row and no code."""

from __future__ import annotations

from collections.abc import Mapping
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class When:
    """Conditions that must all hold.

    Attributes:
        architecture: Any of these.
        format: Any of these.
        precision: Any of these.
        kv_cache_dtype: Any of these.
        sm: Compute capability x 10 of the card, any of these.
        sm_below: Compute capability x 10 is lower.
        beyond_sliding_window: `max_seq_len` exceeds the model's sliding window.
        beyond_original_context: `max_seq_len` exceeds the context up to which a LongRoPE model's
            short factors hold.
    """

    architecture: Listed[str] | None = None
    format: Listed[str] | None = None
    precision: Listed[str] | None = None
    kv_cache_dtype: Listed[str] | None = None
    sm: Listed[PositiveInt] | None = None
    sm_below: PositiveInt | None = None
    beyond_sliding_window: Literal[True] | None = None
    beyond_original_context: Literal[True] | None = None

    def __post_init__(self) -> None:
        if not self._stated:
            raise ValueError("a row without conditions would fire for every recipe")
        for field, known in (("format", format_specs()), ("precision", quant_specs())):
            if unknown := set(getattr(self, field) or ()) - set(known):
                raise ValueError(f"{field}: {sorted(unknown)} is none of {sorted(known)}")

    @property
    def _stated(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def holds(self, given: Mapping[str, Any]) -> bool:
        """Whether every condition holds; one on what is not given does not."""
        for name, allowed in self._stated.items():
            if name not in given:
                return False
            value = given[name]
            if isinstance(allowed, tuple):
                if value not in allowed:
                    return False
            elif not (value < allowed if name == "sm_below" else value):
                return False
        return True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KnownBad:
    """One row of the table; its fields are explained at the top of the data file."""

    id: str
    when: When
    severity: Literal["error", "warning", "note"]
    path: str
    message: str
    source: str


def conditions_of(request: PlanRequest) -> dict[str, Any]:
    """What the conditions of a row are held against."""
    shape, sm, context = request.shape, request.target.sm, request.limits.max_seq_len
    return {
        "architecture": shape.architecture,
        "format": request.format.name,
        "precision": request.precision.name,
        "kv_cache_dtype": request.limits.kv_cache_dtype,
        "sm": sm,
        "sm_below": sm,
        "beyond_sliding_window": shape.window is not None and context > shape.window,
        "beyond_original_context": shape.short_rope_context is not None
        and context > shape.short_rope_context,
    }


def checkpoint_faults(*, architecture: str, kv_cache_dtype: str) -> list[Fault]:
    """Errors of the table that hold for a checkpoint whatever the card and the runtime."""
    given = {"architecture": architecture, "kv_cache_dtype": kv_cache_dtype}
    return [
        Fault("kv_cache_dtype", f"{row.message} ({row.source})")
        for row in known_bad_table()
        if row.severity == "error" and row.when.holds(given)
    ]


@cache
def known_bad_table() -> tuple[KnownBad, ...]:
    """The table that travels with the package."""
    return parse_table(files("pipeline.plan").joinpath("known_bad.yaml").read_text("utf-8"))


def parse_table(text: str) -> tuple[KnownBad, ...]:
    """Read a table.

    Raises:
        ValueError: A row has an unknown key or condition, a wrong type, no condition, or the id of
            another. That is a bug of the table, not of the user.
    """
    import yaml  # 8 ms, and only plans need it

    rows = tuple(KnownBad(**{**row, "when": When(**row["when"])}) for row in yaml.safe_load(text))
    ids = [row.id for row in rows]
    if len(set(ids)) < len(ids):
        raise ValueError(f"two rows share an id: {sorted(ids)}")
    return rows
