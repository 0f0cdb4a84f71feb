"""Of a multimodal repository the language model is built, its tensors byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.core.cache import digest_folder
from pipeline.core.values import Licence, Weights
from pipeline.model.hf import load_model
from pipeline.model.read import read_spec
from pipeline.quant.unified import UnifiedCheckpoint
from pipeline.sources.language_model import language_model
from tests.architectures import tiny_architecture


def multimodal(folder: Path, text_dir: Path) -> Weights:
    """A repository as Mistral 3's are: nested config, prefixed tensors, a vision tower."""
    import torch
    from safetensors.torch import load_file, save_file

    text = json.loads((text_dir / "config.json").read_text())
    del text["architectures"]
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": text,
        "vision_config": {"model_type": "pixtral"},
    }
    tensors = load_file(text_dir / "model.safetensors")
    named = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    named["vision_tower.patch_conv.weight"] = torch.ones(4, 3, 2, 2)
    folder.mkdir()
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        (folder / name).write_bytes((text_dir / name).read_bytes())
    licence = Licence(spdx="Apache-2.0", files=("LICENSE",), redistribution="allowed")
    files = tuple(digest_folder(folder))
    return Weights(dir=folder, origin="hub:a/b", commit="0" * 40, files=files, licence=licence)


def test_language_model_of_a_multimodal_repository_is_the_text_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    text_dir = tiny_architecture("ministral3", tmp_path / "text")
    whole = multimodal(tmp_path / "whole", text_dir)
    folder = tmp_path / "cache" / "weights" / "hub" / "a--b" / "text"
    made = language_model(whole, folder)
    nested = json.loads((whole.dir / "config.json").read_text())
    assert UnifiedCheckpoint(made.dir).spec == read_spec(nested)
    UnifiedCheckpoint(made.dir).check_tensors()
    assert "1 tensors that read other than text are left out" in made.note
    assert made.files == tuple(digest_folder(made.dir))
    assert (made.dir / "LICENSE").is_file()
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        got, want = (load_model(each, "float32")(ids).logits for each in (made.dir, text_dir))
    assert torch.equal(got, want)

    before = (made.dir / "model.safetensors").stat().st_mtime_ns
    assert language_model(whole, folder) == made  # kept
    assert (made.dir / "model.safetensors").stat().st_mtime_ns == before
    assert language_model(made, folder) is made  # text already
