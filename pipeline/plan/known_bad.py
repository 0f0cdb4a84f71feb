"""The known-bad table: a data file of conditions, so that a lesson costs a row and no code."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from pipeline.core.errors import Fault
from pipeline.core.settings import STRICT
from pipeline.plan.request import PlanRequest

CONDITIONS: Mapping[str, type] = {
    "architecture": list,
    "format": list,
    "precision": list,
    "kv_cache_dtype": list,
    "sm": list,  # compute capability x 10 of the card
    "sm_below": int,
    "beyond_sliding_window": bool,  # max_seq_len exceeds the model's sliding window
    "beyond_original_context": bool,  # ... the context up to which LongRoPE's short factors hold
}
"""What a row's `when` may state: any of a list, less than a number, or that something is so."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KnownBad:
    """One row of the table; its fields are explained at the top of the data file."""

    id: str
    when: dict[str, Any]
    severity: Literal["error", "warning", "note"]
    path: str
    message: str
    source: str

    def __post_init__(self) -> None:
        if not self.when:
            raise ValueError("a row without conditions would fire for every recipe")
        for name, value in self.when.items():
            if name not in CONDITIONS or type(value) is not CONDITIONS[name]:
                raise ValueError(f"{name}: {value!r} is no condition of this table")

    def holds(self, given: Mapping[str, Any]) -> bool:
        """Whether every condition holds; one on what is not given does not."""
        return all(
            name in given and _holds(name, value, given[name]) for name, value in self.when.items()
        )


def _holds(name: str, value: Any, found: Any) -> bool:
    if isinstance(value, list):
        return found in value
    return bool(found < value if name == "sm_below" else found is value)


def conditions_of(request: PlanRequest) -> dict[str, Any]:
    """What the conditions of a row are held against."""
    shape, context = request.shape, request.limits.max_seq_len
    return {
        "architecture": shape.architecture,
        "format": request.format.name,
        "precision": request.precision.name,
        "kv_cache_dtype": request.limits.kv_cache_dtype,
        "sm": request.target.sm,
        "sm_below": request.target.sm,
        "beyond_sliding_window": context > (shape.window or context),
        "beyond_original_context": context > (shape.short_rope_context or context),
    }


def checkpoint_faults(*, architecture: str, kv_cache_dtype: str) -> list[Fault]:
    """Errors of the table that hold for a checkpoint whatever the card and the runtime."""
    given = {"architecture": architecture, "kv_cache_dtype": kv_cache_dtype}
    return [
        Fault("kv_cache_dtype", f"{row.message} ({row.source})")
        for row in known_bad_table()
        if row.severity == "error" and row.holds(given)
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

    rows = tuple(KnownBad(**row) for row in yaml.safe_load(text))
    ids = [row.id for row in rows]
    if len(set(ids)) < len(ids):
        raise ValueError(f"two rows share an id: {sorted(ids)}")
    return rows
