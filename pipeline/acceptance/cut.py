"""The two-layer cut: what stands in for a model that is too large to run here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import CorruptError
from pipeline.formats.trtrtx.stage import CPU_CUT, cut_layers
from pipeline.quant.unified import UnifiedCheckpoint

if TYPE_CHECKING:
    from pipeline.quant.simulate import Accumulation

MAX_MEDIAN_DIFFERENCE = 1e-3
"""Largest median over positions of the largest logit difference, where the noise is below it. Two
layers of SmolLM2 agree to 3e-5 at the median; single positions differ by up to 0.2 where a last-bit
difference flips an E4M3 code (2026-11-24)."""
NOISE_FACTOR = 2.0
"""How much more than the simulation differs from itself is allowed. A wide model has so many codes
that some flip at every position: two layers of Phi-3's shape differ by 0.074 at the median, and the
simulation from itself by 0.076 when its linears only add up in float64 (2026-11-25)."""
_TOKENS = 48
_WAYS: tuple[Accumulation, Accumulation] = ("float32", "float64")


def compare_cut(checkpoint_dir: Path, graphs_dir: Path) -> dict[str, Any]:
    """Compare the two-layer cut on ONNX Runtime with a PyTorch simulation of the checkpoint.

    The measure of what is allowed is taken beside it: the simulation against itself in another
    summation order.

    Raises:
        CorruptError: They disagree by more.
    """
    import numpy as np

    from pipeline.quant.simulate import load_simulation
    from pipeline.runners.onnxruntime import OnnxRuntimeGraph, graph_session
    from pipeline.runners.transformers import TransformersSession

    checkpoint = UnifiedCheckpoint(checkpoint_dir)
    layers = cut_layers(checkpoint)
    tokens = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, _TOKENS).tolist()
    simulated, again = (
        TransformersSession(
            load_simulation(checkpoint_dir, layers=layers, accumulate=accumulate)
        ).logits(tokens)
        for accumulate in _WAYS
    )
    graph = graph_session(OnnxRuntimeGraph(graphs_dir / CPU_CUT)).logits(tokens)
    worst = np.abs(simulated - graph).max(axis=-1)  # [tokens]
    median = float(np.median(worst))
    noise = float(np.median(np.abs(simulated - again).max(axis=-1)))
    allowed = max(MAX_MEDIAN_DIFFERENCE, NOISE_FACTOR * noise)
    if not median <= allowed:
        raise CorruptError(
            f"layers {layers} of the graph differ from a simulation of the checkpoint "
            f"by {median:.2g} at the median position, {allowed:.2g} is allowed: "
            "this is a bug in the converter, please report it with the model's config.json"
        )
    return {
        "layers": list(layers),
        "positions": _TOKENS,
        "median_difference": median,
        "median_noise": noise,
        "positions_within_1e-3": int((worst <= 1e-3).sum()),
    }
