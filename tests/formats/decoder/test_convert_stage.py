"""The convert stage: what its key covers, and the cut that stands in for the whole graph."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from pipeline.core.cache import StageCache
from pipeline.formats.trtrtx.onnx_graph import (
    CPU_CUT,
    CPU_GRAPH,
    RTX_CUT,
    RTX_GRAPH,
    GraphSettings,
    convert,
    cut_context,
)
from pipeline.model.read import read_spec
from pipeline.model.spec import ModelSpec
from tests.architectures import WINDOW, tiny_fp8_architecture

SETTINGS = GraphSettings(context=160, activation="bfloat16")


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_fp8_architecture("phi3", tmp_path_factory.mktemp("checkpoint"))


def config_of(checkpoint_dir: Path, **changes: object) -> ModelSpec:
    text = json.loads((checkpoint_dir / "config.json").read_text())
    return read_spec(text | changes)


@pytest.mark.parametrize(
    ("window", "context", "wanted"),
    [
        (None, 4096, 64),
        (None, 32, 32),
        (2047, 4096, 2111),
        (2047, 2048, 2048),
        (2047, 2047, 64),  # nothing is ever hidden: that graph has no window
        (262144, 4096, 64),
    ],
)
def test_cut_reaches_beyond_a_window_that_the_graph_has(
    checkpoint_dir: Path, window: int | None, context: int, wanted: int
) -> None:
    assert cut_context(config_of(checkpoint_dir, sliding_window=window), context) == wanted


def test_cuts_have_the_window_of_the_whole_graph(checkpoint_dir: Path, tmp_path: Path) -> None:
    graphs = convert(checkpoint_dir, "digest", SETTINGS, StageCache(root=tmp_path))
    for name in (RTX_GRAPH, CPU_GRAPH, RTX_CUT, CPU_CUT):
        graph = onnx.load(graphs.dir / name, load_external_data=False).graph
        kinds = {node.output[0]: node.op_type for node in graph.node}
        assert kinds["attention_mask"] == "And"
        cache = next(tensor for tensor in graph.input if tensor.name == "past_key.0")
        context = cache.type.tensor_type.shape.dim[2].dim_value
        assert context == (WINDOW + 64 if "cut" in name else SETTINGS.context)
