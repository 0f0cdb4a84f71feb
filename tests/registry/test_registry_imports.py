from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pipeline

_HEAVY = {"torch", "transformers", "modelopt", "onnx", "onnxruntime", "numpy", "boto3", "rich"}


def test_registry_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "import pipeline.registry.resolve, pipeline.registry.gc, pipeline.registry.stores.folder\n"
        f"print(sorted({_HEAVY!r} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(pipeline.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
