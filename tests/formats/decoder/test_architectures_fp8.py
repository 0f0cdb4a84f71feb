"""FP8 checkpoints of every architecture: the graph agrees with the simulation, layer by layer.

Layers are compared one at a time: behind an FP8 code that a last-bit difference flips, all later
layers differ, in wide models at most positions.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.core.values import Checkpoint
from pipeline.quant.simulate import load_simulation
from pipeline.quant.unified import UnifiedCheckpoint
from tests.architectures import ARCHITECTURES, ORIGINAL_CONTEXT, tiny_fp8_architecture
from tests.formats.decoder.decoders import graph_logits, model_logits, random_prompt, write_graph
from tests.quant.tiny_quantized import architecture_checkpoint

CONTEXT = 128
PROMPT = random_prompt(100)  # beyond every window and every original context


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """The tiny model as ModelOpt quantizes it."""
    return architecture_checkpoint(tmp_path_factory.mktemp("fp8"), request.param)


def median_distance(checkpoint_dir: Path, graph_dir: Path, layers: tuple[int, ...]) -> float:
    """Median over positions of the largest logit difference."""
    graph = write_graph(checkpoint_dir, graph_dir, context=CONTEXT, layers=layers)
    simulation = load_simulation(checkpoint_dir, layers=layers, context=CONTEXT)
    wanted = model_logits(simulation, PROMPT)
    assert np.ptp(wanted) > 1.0
    return float(np.median(np.abs(graph_logits(graph, PROMPT) - wanted).max(axis=-1)))


def test_every_layer_agrees_with_the_simulation(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = UnifiedCheckpoint(checkpoint.dir).spec
    per_layer = len(config.layers[0].modules)
    assert len(checkpoint.quantized_linears) == per_layer * config.num_layers
    for layer in range(config.num_layers):
        assert median_distance(checkpoint.dir, tmp_path / str(layer), (layer,)) < 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_foreign_checkpoint_whose_scales_differ_agrees_with_the_simulation(
    name: str, tmp_path: Path
) -> None:
    """As plain ModelOpt writes it; one linear is kept in 16 bits, fused ones included."""
    fused = name.startswith("phi")
    kept = "model.layers.1.mlp." + ("gate_up_proj" if fused else "up_proj")
    folder = tiny_fp8_architecture(name, tmp_path / "model", keep_16bit={kept})
    assert kept not in UnifiedCheckpoint(folder).quantized_linears
    for layer in (0, 1):
        assert median_distance(folder, tmp_path / str(layer), (layer,)) < 1e-3


@pytest.fixture
def longrope_dir(tmp_path: Path) -> Path:
    return tiny_fp8_architecture("phi3-long", tmp_path / "longrope")


def test_simulation_of_a_context_keeps_its_longrope_factors(longrope_dir: Path) -> None:
    """Transformers chooses by the row; an engine of that context does not."""
    short_row = random_prompt(20)
    free = model_logits(load_simulation(longrope_dir), short_row)
    within = model_logits(load_simulation(longrope_dir, context=ORIGINAL_CONTEXT), short_row)
    beyond = model_logits(load_simulation(longrope_dir, context=ORIGINAL_CONTEXT + 1), short_row)
    np.testing.assert_array_equal(within, free)
    assert np.abs(beyond - free).max() > 0.05
