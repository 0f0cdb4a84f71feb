"""The two-layer cut: what stands in for a model that is too large to run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.convert.stage import CPU_CUT, cut_layers
from pipeline.convert.unified import UnifiedCheckpoint
from pipeline.errors import CorruptError

MAX_MEDIAN_DIFFERENCE = 1e-3
"""Largest median over positions of the largest logit difference. Two layers agree to 3e-5 at the
median; single positions differ by up to 0.2 where a last-bit difference flips an E4M3 code, and the
simulation differs from itself as much when only its summation order changes (2026-11-24)."""
_TOKENS = 48


def compare_cut(checkpoint_dir: Path, graphs_dir: Path) -> dict[str, Any]:
    """Compare the two-layer cut on ONNX Runtime with a PyTorch simulation of the checkpoint.

    Raises:
        CorruptError: They disagree at more than half of the positions.
    """
    import numpy as np

    from pipeline.convert.simulate import load_simulation
    from pipeline.runners.onnxruntime import OnnxRuntimeGraph, OnnxRuntimeSession
    from pipeline.runners.transformers import TransformersSession

    config = UnifiedCheckpoint(checkpoint_dir).config
    layers = cut_layers(UnifiedCheckpoint(checkpoint_dir))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, _TOKENS).tolist()
    simulated = TransformersSession(load_simulation(checkpoint_dir, layers=layers))
    graph = OnnxRuntimeSession(OnnxRuntimeGraph(graphs_dir / CPU_CUT))
    worst = np.abs(simulated.logits(tokens) - graph.logits(tokens)).max(axis=-1)  # [tokens]
    median = float(np.median(worst))
    if not median <= MAX_MEDIAN_DIFFERENCE:
        raise CorruptError(
            f"layers {layers} of the graph differ from a simulation of the checkpoint "
            f"by {median:.2g} at the median position, {MAX_MEDIAN_DIFFERENCE:g} is allowed: "
            "this is a bug in the converter, please report it with the model's config.json"
        )
    return {
        "layers": list(layers),
        "positions": _TOKENS,
        "median_difference": median,
        "positions_within_1e-3": int((worst <= 1e-3).sum()),
    }
