"""Whether this machine can build at all: asked before any work, answered in milliseconds."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from pathlib import Path

from pipeline.core.errors import IncompatibleError, TransientError
from pipeline.formats.spec import format_spec
from pipeline.plan.sizes import BuildNeeds

log = logging.getLogger(__name__)

_BUILDER = (
    "torch", "transformers", "modelopt", "safetensors", "numpy", "psutil", "jinja2", "matplotlib",
)  # fmt: skip


def require_builder(engine_format: str) -> None:
    """Demand the packages that building this format imports."""
    wanted = (*_BUILDER, *format_spec(engine_format).packages)
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        raise IncompatibleError(
            f"building needs {', '.join(missing)}, not installed here: "
            "run pip install '.[build]' in the checkout"
        )


def require_room(needs: BuildNeeds, cache_dir: Path) -> None:
    """Demand the disk that a plan foresees; warn about too little memory."""
    existing = next(folder for folder in (cache_dir, *cache_dir.parents) if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    needed_bytes = sum(needs.disk_bytes.values())
    if free_bytes < needed_bytes:
        raise TransientError(
            f"disk full: building needs about {needed_bytes / 1e9:.1f} GB below "
            f"{existing}, {free_bytes / 1e9:.1f} GB are free; free some, or set ENGINESMITH_CACHE"
        )
    memory_bytes = available_bytes()
    ram_bytes = max(needs.quantize_ram_min_bytes, needs.compile_ram_bytes)
    if memory_bytes < ram_bytes:
        log.warning(
            "Building needs about %.1f GB of memory, %.1f GB are available",
            ram_bytes / 1e9,
            memory_bytes / 1e9,
        )


def available_bytes() -> int:
    """Memory that is free on this machine."""
    import psutil

    return int(psutil.virtual_memory().available)
