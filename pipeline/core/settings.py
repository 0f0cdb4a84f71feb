"""What every configurable class shares: a strict, frozen pydantic dataclass is its own schema.

    @dataclass(frozen=True, kw_only=True, config=STRICT)   # from pydantic.dataclasses
    class Compiler:
        max_batch_size: PositiveInt

Its fields are the YAML keys. `STRICT` refuses unknown keys and wrong types instead of converting
them: `max_batch_size: "8"` is a fault, not 8. YAML has no tuples and no paths, so the two aliases
below are the only conversions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import ConfigDict, Strict

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
# Arbitrary types: a field typed as a Protocol is checked by isinstance.

_Item = TypeVar("_Item")

Listed = Annotated[tuple[_Item, ...], Strict(False)]
"""A YAML list, frozen into a tuple."""

PathField = Annotated[Path, Strict(False)]
"""A YAML string that names a file or folder."""
