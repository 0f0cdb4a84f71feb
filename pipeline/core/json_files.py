"""Reads JSON files that others wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.core.errors import CorruptError


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CorruptError: It is something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: not JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{path}: a JSON {type(value).__name__}, wanted an object")
    return value
