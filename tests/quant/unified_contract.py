"""Recorded scales of the unified FP8 checkpoint: equal under both sets.

The builder runs under today's packages and under those of the build image. `golden/scales.json`
holds the values of each architecture's scales; whichever set runs the tests is compared with it.
After a change of the tiny models or of calibration:

    python -m tests.quant.unified_contract
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.values import Checkpoint
from pipeline.quant.unified import UnifiedCheckpoint
from tests.architectures import ARCHITECTURES
from tests.quant.tiny_quantized import architecture_checkpoint

GOLDEN = Path(__file__).parent / "golden" / "scales.json"


def scales_of(checkpoint_dir: Path) -> dict[str, float]:
    """All its scales."""
    checkpoint = UnifiedCheckpoint(checkpoint_dir)
    names = (name for name in checkpoint.tensors if name.endswith("_scale"))
    return {name: float(checkpoint.scalar(name)) for name in sorted(names)}


def source_sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 of the weights that a checkpoint was made from."""
    return hashlib.sha256((checkpoint.weights.dir / "model.safetensors").read_bytes()).hexdigest()


def _record() -> Iterator[tuple[str, dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        for name in ARCHITECTURES:
            made = architecture_checkpoint(Path(folder), name)
            yield name, {"source": source_sha256(made), "scales": scales_of(made.dir)}


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(dict(_record()), indent=1) + "\n")
