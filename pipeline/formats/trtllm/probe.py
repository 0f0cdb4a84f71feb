"""Versions of what builds the engine, told by the interpreter that has it.

    python3 probe.py OUT.json

Runs in the build image, where this project need not be installed: standard library only, and
nothing is imported that touches a GPU. TensorRT's version is not in the engine's `config.json`,
although an engine loads only in the version that built it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import runpy
import sys
from pathlib import Path


def distribution_version(name: str) -> str:
    """Version of an installed distribution; empty if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def tensorrt_version() -> str:
    """Version of TensorRT; the image's own build of it may have left no record for pip."""
    if found := distribution_version("tensorrt"):
        return found
    try:
        tensorrt = importlib.import_module("tensorrt")
    except ImportError:
        return ""
    return str(tensorrt.__version__)


def torch_cuda() -> str:
    """CUDA release of the installed PyTorch, read from its version file without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    path = Path(spec.origin).parent / "version.py"
    return str(runpy.run_path(str(path)).get("cuda") or "") if path.is_file() else ""


def versions() -> dict[str, str]:
    """All that is told."""
    return {
        "tensorrt-llm": distribution_version("tensorrt_llm"),
        "tensorrt": tensorrt_version(),
        "cuda": torch_cuda(),
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(versions(), indent=1) + "\n")
