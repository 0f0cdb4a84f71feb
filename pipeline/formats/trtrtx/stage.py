"""The convert stage: one folder with the shared weights and every graph that later stages read."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.core.cache import StageCache, StageResult
from pipeline.core.stages import Stage
from pipeline.formats.trtrtx.graph_writer import WEIGHTS_FILE, write_weights
from pipeline.formats.trtrtx.onnx_graph import ActivationDtype, build_decoder, save_graph
from pipeline.model.spec import ModelSpec, layer_name
from pipeline.quant.unified import UnifiedCheckpoint

RTX_GRAPH = "rtx.onnx"
"""What TensorRT-RTX compiles."""
CPU_GRAPH = "cpu.onnx"
"""The same graph in float32, for ONNX Runtime on a CPU."""
RTX_CUT = "rtx-cut.onnx"
CPU_CUT = "cpu-cut.onnx"
"""Both with two layers only, for the network check."""
CUT_LAYERS = 2
_CUT_CONTEXT = 64
"""Cache length of the cut, tokens: longer than the check's prompts, and fast to evaluate."""

GRAPH_CODE = (
    "pipeline.model.dense",
    "pipeline.model.families",
    "pipeline.model.read",
    "pipeline.model.spec",
    "pipeline.formats.trtrtx.graph_writer",
    "pipeline.formats.trtrtx.onnx_graph",
    "pipeline.formats.trtrtx.stage",
    "pipeline.quant.unified",
)
"""The modules that shape the bytes of a graph; not those of other formats."""
STAGE = Stage(name="convert", version=1, code=GRAPH_CODE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """What the graphs depend on beside the checkpoint: static cache length, dtype for RTX."""

    context: int
    activation: ActivationDtype

    def inputs(self) -> dict[str, Any]:
        """Everything but the checkpoint that shapes the graphs' bytes."""
        tools = {"onnx": version("onnx")}
        return {**STAGE.identity, **dataclasses.asdict(self), "tools": tools}


def convert(
    checkpoint_dir: Path, checkpoint_digest: str, settings: GraphSettings, cache: StageCache
) -> StageResult:
    """Write the graphs of a checkpoint, or take them from the cache.

    Raises:
        RecipeError: The model has something that the graph does not support.
        CorruptError: The checkpoint is damaged.
    """
    inputs = {"checkpoint": checkpoint_digest, **settings.inputs()}
    return cache.run(STAGE, inputs, lambda out: write_graphs(checkpoint_dir, settings, out))


def cut_context(spec: ModelSpec, context: int) -> int:
    """Cache length of the cut of a graph whose own is `context`, tokens.

    It reaches beyond a sliding window that the graph has, so that the cut has one too.
    """
    window = spec.window
    beyond = window if window is not None and window < context else 0
    return min(context, beyond + _CUT_CONTEXT)


def cut_layers(checkpoint: UnifiedCheckpoint) -> tuple[int, ...]:
    """The two neighbouring layers with the most quantized linears, the first such pair.

    A recipe may keep the first layers in 16 bits, and their cut would show no quantized linear.
    """
    count = checkpoint.spec.num_layers
    width = min(CUT_LAYERS, count)
    pairs = (tuple(range(first, first + width)) for first in range(count - width + 1))
    return max(pairs, key=lambda pair: len(quantized_linears(checkpoint, pair)))


def quantized_linears(checkpoint: UnifiedCheckpoint, layers: tuple[int, ...]) -> tuple[str, ...]:
    """Those of some layers."""
    prefixes = tuple(f"{layer_name(layer)}." for layer in layers)
    return tuple(name for name in checkpoint.quantized_linears if name.startswith(prefixes))


def write_graphs(checkpoint_dir: Path, settings: GraphSettings, out_dir: Path) -> None:
    """Write weights, the two graphs and their cuts into `out_dir`."""
    checkpoint = UnifiedCheckpoint(checkpoint_dir)
    slots = write_weights(checkpoint, out_dir / WEIGHTS_FILE)
    short = cut_context(checkpoint.spec, settings.context)
    cut = cut_layers(checkpoint)
    for name, activation, context, layers in (
        (RTX_GRAPH, settings.activation, settings.context, None),
        (CPU_GRAPH, "float32", settings.context, None),
        (RTX_CUT, settings.activation, short, cut),
        (CPU_CUT, "float32", short, cut),
    ):
        graph = build_decoder(
            checkpoint, slots, context=context, activation=activation, layers=layers
        )
        save_graph(graph, out_dir / name)
