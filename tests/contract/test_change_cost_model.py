"""A new architecture is one file and one shape: it plans, is written, and converts.

Nothing else of the pipeline is edited: this test adds the two files and uses what is there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.build import plan_of
from pipeline.config.compose import config_folders
from pipeline.config.load import load
from pipeline.core.errors import RecipeError
from pipeline.formats.trtllm.layout import trtllm_config
from pipeline.formats.trtrtx.onnx_graph import CPU_GRAPH, GraphSettings, write_graphs
from pipeline.model import families
from pipeline.model.hf import write_random_model
from pipeline.model.read import model_types, read_spec
from pipeline.quant.unified import UnifiedCheckpoint
from pipeline.runners.onnxruntime import OnnxRuntimeGraph, graph_session

FAMILY = '''\
"""Toy: Qwen's biases on Phi's stored tensors, and a key of its own for the window."""

from pipeline.model.read import ConfigKeys
from pipeline.model.dense import dense_decoder
from pipeline.model.spec import ModelSpec

ARCHITECTURE = "ToyForCausalLM"


def read(keys: ConfigKeys) -> ModelSpec:
    keys.require("toy_mode", "plain")
    window = keys.optional_integer("toy_window", absent=None)
    return dense_decoder(keys, window=window, qkv_bias=True, fused=True, kv_heads_default=True)
'''
SHAPE = """\
architectures: [ToyForCausalLM]
model_type: toy
hidden_size: 64
intermediate_size: 96
num_hidden_layers: 3
num_attention_heads: 4
num_key_value_heads: 2
vocab_size: 320
max_position_embeddings: 4096
rms_norm_eps: 1.0e-5
toy_window: 24
toy_mode: plain
"""
RECIPE = """\
defaults:
  - build
  - shapes@shape: toy
  - override source: local
  - _self_

name: toy
version: 1.0.0
source: {path: /nowhere, licence: Apache-2.0}
compiler: {max_batch_size: 8, max_seq_len: 1024}
"""


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the recipe and the shape; the family lies in a folder of its own."""
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "toy.py").write_text(FAMILY)
    (tmp_path / "recipes" / "shapes").mkdir(parents=True)
    (tmp_path / "recipes" / "shapes" / "toy.yaml").write_text(SHAPE)
    (tmp_path / "recipes" / "toy.yaml").write_text(RECIPE)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
    yield tmp_path / "recipes"
    sys.modules.pop(f"{families.__name__}.toy", None)


def test_toy_architecture_is_one_file_and_a_shape(recipes: Path, tmp_path: Path) -> None:
    assert "toy" in model_types()
    job = load("toy", (), folders=config_folders(recipes))
    spec = job.value.shape
    plan = plan_of(job.value)
    assert plan.faults == ()
    assert plan.sizes.params == spec.params

    folder = tmp_path / "model"
    folder.mkdir()
    write_random_model(spec, folder, documents=["a toy"], seed=0)
    checkpoint = UnifiedCheckpoint(folder)
    assert checkpoint.spec == spec
    checkpoint.check_tensors()

    graphs = tmp_path / "graphs"
    graphs.mkdir()
    write_graphs(folder, GraphSettings(context=64, activation="bfloat16"), graphs)
    logits = graph_session(OnnxRuntimeGraph(graphs / CPU_GRAPH)).logits(list(range(40)))
    assert logits.shape == (40, 320)
    assert np.isfinite(logits).all()

    with pytest.raises(RecipeError, match=r"architectures: is ToyForCausalLM.*compiler=checkpoint"):
        trtllm_config(spec, dtype="bfloat16", kv_fp8=False, exclude=[])


def test_its_unknown_keys_and_wrong_values_are_refused_as_for_any_family(recipes: Path) -> None:
    config = load("toy", (), folders=config_folders(recipes)).value.shape.config
    with pytest.raises(RecipeError) as refused:
        read_spec({**config, "toy_mode": "fast", "toy_window": 0, "toy_gain": 2})
    paths = [fault.path for fault in refused.value.faults]
    assert paths == ["config.json: toy_mode", "config.json: toy_window", "config.json: toy_gain"]
