"""Where data lies: `conf/` and `recipes/`, which come with this code, the cache; JSON of others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import CorruptError

_PACKAGE = Path(__file__).resolve().parent.parent


def cache_root() -> Path:
    """`$ENGINESMITH_CACHE`, else `~/.cache/enginesmith`."""
    configured = os.environ.get("ENGINESMITH_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "enginesmith"


def data_dir(name: Literal["conf", "recipes"]) -> Path:
    """The folder of that name beside `pipeline/` in a checkout, inside it in an installed wheel.

    A checkout has a pyproject.toml: `site-packages/conf` may be another package's.
    """
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    return _PACKAGE / "_data" / name


def shipped(option: str) -> dict[str, Any]:
    """The keys of an option as it ships, such as `runner/vllm`, less its `kind` and `defaults`."""
    import yaml

    values = yaml.safe_load((data_dir("conf") / f"{option}.yaml").read_text(encoding="utf-8"))
    return {name: value for name, value in values.items() if name not in ("kind", "defaults")}


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON object; a `CorruptError` for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: not JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{path}: a JSON {type(value).__name__}, wanted an object")
    return value
