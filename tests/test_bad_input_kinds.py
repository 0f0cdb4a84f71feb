"""Bad recipes, configs, checkpoints, packages and registries: one clear message, nothing left."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.core.data import data_dir

RECIPE = (data_dir("recipes") / "phi3.yaml").read_text()
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def refuse(
    arguments: list[str],
    code: int,
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run a command in `folder` that must fail at once, say what is wrong, and leave nothing."""
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["enginesmith", *arguments])
    monkeypatch.setenv("ENGINESMITH_CACHE", str(folder.parent / "cache"))
    monkeypatch.setenv("ENGINESMITH_CONFIG", str(folder.parent / "config"))
    assert main() == code, capsys.readouterr().err
    shown = capsys.readouterr()
    errors = shown.err + shown.out
    assert message in errors
    assert "Traceback" not in errors
    assert "\n\n" not in shown.err.strip(), "one paragraph"
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: phi3", "name: Phi_3", "did you mean phi-3?"),
        ("name: phi3", "name: ''", "is not a name"),
        ("name: phi3", "name: 3", "name: got 3, wanted text"),
        ("name: phi3\n", "", "name: is required"),
        ("version: 1.0.0", "version: v1", "is not a version"),
        ("version: 1.0.0", "version: 1.0", "version: got 1.0, wanted text"),
        ("version: 1.0.0", f"version: '{'1' * 41}'", "at most 40 characters"),
        ("repo_id: microsoft/Phi-3-mini-4k-instruct", "repo_id: 3", "source.repo_id: got 3"),
        ("revision: 0a67737cc96d2554230f90338b163bc6380a2a85", "revision: main", "40 hex digits"),
        ("licence: MIT", "license: MIT", "did you mean source.licence?"),
        ("redistribution: allowed", "redistribution: maybe", "wanted 'allowed'"),
        ("redistribution: allowed", "redistribution: ${oc.env:HOME}", "holds data only"),
        ("redistribution: allowed", "redistribution: ${nowhere}", "cannot be resolved"),
        ("override target: rtx4090", "override target: rtx4090ti", "did you mean rtx4090?"),
        ("override compiler: trtllm", "override compiler: tensorrt", "asks for 'tensorrt'"),
        ("override calibration: dolly", "override calibrations: dolly", "cannot be read"),
        ("batch: 4,", "batch: 0,", "acceptance.targets.0.batch: got 0, wanted a number > 0"),
        ("batch: 4,", "batch: four,", "wanted a whole number"),
        ("batch: 4,", "batch: 4, batches: 4,", "there is no such key"),
        ("osl: 256, min_output", "osl: 2560, min_output", "acceptance.targets"),
        ("min_output_tokens_per_s: 312.0", "min_output_tokens_per_s: 31200.0", "ceiling"),
        ("  targets:", "  target:", "acceptance.target: there is no such key"),
        ("shapes@shape: phi3", "shapes@shape: phi4", "asks for 'phi4'"),
        ("  - build\n", "", "cannot be read"),
        ("defaults:", "defaults: 3\nx:", "cannot be read"),
        ("\nsource:", "\nsource: [", "cannot be read"),
        ("\nsource:", "\n_target_: os.system\nsource:", "_target_: there is no such key"),
        (
            "\nsource:",
            "\ncompiler: {max_batch_size: -1}\nsource:",
            "compiler.max_batch_size: got -1",
        ),
        ("\nsource:", "\ncompiler: {plugins: 3}\nsource:", "compiler.plugins"),
        ("\nsource:", "\nrunner: {kind: nosuch}\nsource:", "runner.kind"),
    ],
)
def test_recipe(
    old: str, new: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert old in RECIPE
    own = tmp_path / "here"
    own.mkdir()
    (own / "own.yaml").write_text(RECIPE.replace(old, new, 1))
    arguments = ["plan", "own", "--config-dir", "."]
    refuse(arguments, 2, message, own, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ('{"architectures": [', 4, "not JSON"),
        ("[1, 2]", 4, "wanted an object"),
        ("", 4, "not JSON"),
        ("{}", 2, "model_type"),
        ({"model_type": "gpt2"}, 2, "model_type"),
        ({"architectures": ["GPT2LMHeadModel"]}, 2, "architectures"),
        ({"num_attention_heads": 4.5}, 2, "num_attention_heads"),
        ({"num_attention_heads": "4"}, 2, "num_attention_heads"),
        ({"num_key_value_heads": 3}, 2, "num_key_value_heads"),
        ({"rope_theta": 0}, 2, "rope_theta"),
        ({"rope_theta": -1.0}, 2, "rope_theta"),
        ({"rms_norm_eps": -1e-6}, 2, "rms_norm_eps"),
        ({"hidden_size": None}, 2, "hidden_size"),
        ({"hidden_size": 0}, 2, "hidden_size"),
        ({"hidden_act": "gelu"}, 2, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 2, "rope"),
        ({"unheard_of": 1}, 2, "unheard_of"),
    ],
    ids=str,
)
def test_config_json(
    change: object, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = tmp_path / "here" / "model"
    model.mkdir(parents=True)
    text = change if isinstance(change, str) else json.dumps({**LLAMA, **dict(change)})  # type: ignore[call-overload]
    (model / "config.json").write_text(text)
    refuse(["new", "mine", "--from", "model"], code, message, model.parent, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("files", "arguments", "code", "message"),
    [
        ({}, ["export-trtllm", "nowhere", "out"], 7, "nowhere"),
        ({"c/config.json": "{"}, ["export-trtllm", "c", "out"], 4, "config.json"),
        ({"c/config.json": "[]"}, ["export-trtllm", "c", "out"], 4, "config.json"),
        (
            {"c/config.json": json.dumps(LLAMA), "c/hf_quant_config.json": "{"},
            ["export-trtllm", "c", "out"], 4, "c",
        ),
        ({"p/manifest.json": "{"}, ["verify", "./p"], 4, "is not a manifest"),
        ({"p/manifest.json": "[]"}, ["verify", "./p"], 4, "not a JSON object"),
        ({"p/manifest.json": '{"schema":99}'}, ["verify", "./p"], 4, "schema 99"),
        ({}, ["verify", "smollm2@sha256:xyz"], 2, "64 lowercase hex digits"),
        ({}, ["verify", "Smol_LM2"], 2, "did you mean smol-lm2?"),
        ({}, ["verify", "smollm2:stable"], 7, "smollm2"),
        ({}, ["show", "smollm2/a:b:c"], 2, "is not a reference"),
        ({}, ["list", "--registry", "ftp://x"], 2, "ftp://x"),
        ({}, ["list", "--registry", "s3://"], 2, "s3://"),
        ({}, ["list", "--registry", "oci://"], 2, "oci://"),
        ({}, ["build", "smollm2", "--registry", "ftp://x"], 2, "is no registry"),
        ({}, ["config", "smollm"], 2, "did you mean smollm2?"),
        ({}, ["plan", "smollm2", "source=local"], 2, "source.path: is required"),
        ({}, ["new", "mine", "--from", "nowhere/at/all"], 2, "nowhere"),
        ({}, ["new", "mine", "--from", ".", "--target", "rtx409"], 2, "did you mean rtx4090?"),
    ],
    ids=str,
)  # fmt: skip
def test_checkpoint_package_or_registry(
    files: dict[str, str], arguments: list[str], code: int, message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    here = tmp_path / "here"
    here.mkdir()
    for path, text in files.items():
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_text(text)
    refuse(arguments, code, message, here, monkeypatch, capsys)
