"""One folder means one model and one tokenizer, whichever Transformers loads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import IncompatibleError
from pipeline.model.hf import load_model, load_tokenizer, transformers4_spelling
from pipeline.model.read import read_spec
from tests.architectures import ARCHITECTURES, tiny_architecture
from tests.tiny import TEXT

_ROTARY_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def transformers5_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """A config as Transformers 5 writes it: rotary settings in `rope_parameters` alone."""
    if "rope_parameters" in config:
        return {key: value for key, value in config.items() if key not in _ROTARY_KEYS}
    new = {key: value for key, value in config.items() if key not in _ROTARY_KEYS}
    rope = {"rope_type": "default", **(config.get("rope_scaling") or {})}
    rope["rope_type"] = rope.get("type", rope["rope_type"])
    rope["rope_theta"] = config["rope_theta"]
    if "partial_rotary_factor" in config:
        rope["partial_rotary_factor"] = config["partial_rotary_factor"]
    if (local := new.pop("rope_local_base_freq", None)) is not None:
        near = {"rope_type": "default", "rope_theta": local}
        rope = {"full_attention": rope, "sliding_attention": near}
    new["rope_parameters"] = rope
    new["dtype"] = "bfloat16"
    return new


def with_config(folder: Path, config: dict[str, Any], target: Path) -> Path:
    shutil.copytree(folder, target)
    (target / "config.json").write_text(json.dumps(config))
    return target


def logits(folder: Path) -> Any:
    import torch

    tokens = torch.arange(3, 203).unsqueeze(0)
    with torch.inference_mode():
        return load_model(folder, "float32")(tokens).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_spellings_of_a_config_are_one_model(tmp_path: Path, name: str) -> None:
    import torch

    folder = tiny_architecture(name, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    old = transformers4_spelling(config)
    new = transformers5_spelling(config)
    assert "rope_parameters" not in old
    assert "rope_theta" in old
    assert set(new) & {"rope_theta", "rope_scaling"} == set()
    assert read_spec(old) == read_spec(new) == read_spec(config)
    old["torch_dtype"] = old.pop("dtype")
    as_old = logits(with_config(folder, old, tmp_path / "old"))
    as_new = logits(with_config(folder, new, tmp_path / "new"))
    assert torch.equal(as_old, as_new)
    assert torch.equal(as_old, logits(folder))


def test_spelling_of_version_4_is_left_alone() -> None:
    config = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "x"}
    assert transformers4_spelling(config) == config


def test_longrope_keeps_what_version_4_accepts() -> None:
    rope = {
        "rope_type": "longrope",
        "type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0],
        "long_factor": [2.0],
    }
    assert transformers4_spelling({"model_type": "phi3", "rope_parameters": rope}) == {
        "model_type": "phi3",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
    }


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2.5", "phi3"])
def test_tokens_are_those_of_tokenizer_json(tmp_path: Path, name: str) -> None:
    from tokenizers import Tokenizer

    folder = tiny_architecture(name, tmp_path / "model")
    stated = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == stated.encode(TEXT).ids
    assert tokenizer.decode(stated.encode(TEXT).ids) == TEXT
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize("model_type", ["llama", "of_a_stranger"])
def test_code_in_a_model_folder_never_runs(tmp_path: Path, model_type: str) -> None:
    folder = tiny_architecture("llama", tmp_path / "model")
    marker = tmp_path / "it ran"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for name, own in (
        ("config.json", {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["code.T", None]}),
    ):
        config = json.loads((folder / name).read_text())
        if name == "config.json":
            config["model_type"] = model_type
        (folder / name).write_text(json.dumps({**config, "auto_map": own}))
    if model_type == "llama":  # one that Transformers has itself
        load_model(folder, "float32")
        load_tokenizer(folder)
    else:
        with pytest.raises(
            (ValueError, IncompatibleError), match=r"trust_remote_code|does not know"
        ):
            load_model(folder, "float32")
    assert not marker.exists()
