"""The network check as a cached stage: once per architecture, TensorRT-RTX version and graph code.

It runs on a cut of the model: its embedding, two layers, final norm and lm_head with their real
weights. What the parser makes of a layer does not depend on the numbers in it, so the key
holds the model's configuration and which linears are FP8, not the weights.
"""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pipeline.core.cache import StageCache
from pipeline.core.stages import Stage
from pipeline.formats.trtrtx.child import CheckJob, run_child
from pipeline.formats.trtrtx.network_check.guard import DecoderInterface
from pipeline.formats.trtrtx.stage import (
    CPU_CUT,
    GRAPH_CODE,
    RTX_CUT,
    cut_context,
    cut_layers,
    quantized_linears,
)
from pipeline.quant.unified import UnifiedCheckpoint

_RESULT = "result.json"
STAGE = Stage(
    name="network-check",
    version=1,
    code=("pipeline.formats.trtrtx.network_check", "pipeline.formats.trtrtx.child", *GRAPH_CODE),
)
_TOOLS = ("tensorrt-rtx-cu13", "onnxruntime", "onnx")


def check_network_once(
    checkpoint_dir: Path,
    graphs_dir: Path,
    *,
    context: int,
    dtype: Literal["bfloat16", "float16"],
    cache: StageCache,
    log_path: Path,
) -> dict[str, Any]:
    """Check the cut of a converted model, unless one like it has passed before.

    Args:
        checkpoint_dir: Unified checkpoint.
        graphs_dir: Folder of the convert stage.
        context: Cache length of the whole graph, tokens.
        dtype: Activations of the graph for RTX.
        cache: Where a passed check is remembered; a failed one is not.
        log_path: Gets what the checking process prints.

    Returns:
        Differences and layer counts, for the report.

    Raises:
        ToolError: The parsed network is not the graph that we wrote; its message says where.
    """
    checkpoint = UnifiedCheckpoint(checkpoint_dir)
    layers = cut_layers(checkpoint)
    interface = DecoderInterface.of(
        checkpoint.spec,
        context=cut_context(checkpoint.spec, context),
        dtype=dtype,
        num_layers=len(layers),
    )
    inputs = {
        "config": checkpoint.spec.to_json(),
        "interface": dataclasses.asdict(interface),
        "quantized_linears": sorted(quantized_linears(checkpoint, layers)),
        "tools": {name: version(name) for name in _TOOLS},
    }

    def produce(out: Path) -> None:
        job = CheckJob(
            graph=graphs_dir / RTX_CUT,
            reference=graphs_dir / CPU_CUT,
            interface=interface,
            result=out / _RESULT,
        )
        run_child(job, out, stage="network-check", log_path=log_path)

    result: dict[str, Any] = cache.run(STAGE, inputs, produce).read_json(_RESULT)
    return result
