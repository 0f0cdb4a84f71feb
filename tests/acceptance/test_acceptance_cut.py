"""The two-layer cut stands in for a model that is too large to run: it must notice wrong graphs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.acceptance.answers import compare_cut
from pipeline.core.errors import CorruptError
from pipeline.formats.trtrtx.onnx_graph import GraphSettings, write_graphs
from tests.architectures import tiny_fp8_architecture

SETTINGS = GraphSettings(context=64, activation="bfloat16")


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_the_cut_of_a_right_graph_agrees(architecture: str, tmp_path: Path) -> None:
    checkpoint = tiny_fp8_architecture(architecture, tmp_path / "checkpoint")
    (tmp_path / "graphs").mkdir()
    write_graphs(checkpoint, SETTINGS, tmp_path / "graphs")
    found = compare_cut(checkpoint, tmp_path / "graphs")
    assert found["median_difference"] <= max(1e-3, 2 * found["median_noise"])
    assert found["layers"] == [0, 1]


def test_the_cut_of_other_weights_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny_fp8_architecture("llama", tmp_path / "checkpoint")
    wrong = tmp_path / "wrong"
    shutil.copytree(checkpoint, wrong)
    _swap_gate_and_up(wrong)
    (tmp_path / "graphs").mkdir()
    write_graphs(wrong, SETTINGS, tmp_path / "graphs")
    with pytest.raises(CorruptError, match="differ from a simulation"):
        compare_cut(checkpoint, tmp_path / "graphs")


def _swap_gate_and_up(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    gate, up = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up].clone(), tensors[gate].clone()
    save_file(tensors, file, metadata={"format": "pt"})
