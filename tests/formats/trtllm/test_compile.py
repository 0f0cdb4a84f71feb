"""The whole compiler on a tiny checkpoint, with a program that checks what it is given."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.core.cache import StageCache
from pipeline.core.errors import PipelineError, ToolError
from pipeline.core.values import Checkpoint, Engine
from pipeline.formats.trtllm.compiler import TrtLlmCompiler
from pipeline.quant.unified import UnifiedCheckpoint
from tests.formats.trtllm.fakes import card_machine, compiler, package_records
from tests.quant.tiny_quantized import ADA, architecture_checkpoint, tiny_checkpoint

KEPT = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), KEPT)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card_machine(tmp_path / "machine", monkeypatch)


def build(checkpoint: Checkpoint, folder: Path, built: TrtLlmCompiler | None = None) -> Engine:
    cache = StageCache(root=folder / "cache")
    return (built or compiler()).compile(checkpoint, ADA, cache, folder / "logs")


def finished(folder: Path) -> list[Path]:
    """Compiled stages, and whatever a build left beside them."""
    stage = folder / "cache" / "stages" / "compile-trtllm"
    return sorted(stage.iterdir()) if stage.is_dir() else []


@pytest.mark.parametrize(
    "built",
    [compiler(), compiler(kv_cache_dtype="bfloat16"), compiler(dtype="float16")],
    ids=["fp8-cache", "16-bit-cache", "float16"],
)
def test_engine_folder_is_self_contained(
    checkpoint: Checkpoint, tmp_path: Path, built: TrtLlmCompiler
) -> None:
    engine = build(checkpoint, tmp_path, built)
    names = {path.name for path in engine.dir.iterdir()}
    companions = {"tokenizer.json", "tokenizer_config.json", "LICENSE"}
    assert names >= {"rank0.engine", "config.json", *companions}
    for name in companions:
        assert (engine.dir / name).read_bytes() == (checkpoint.dir / name).read_bytes()
    config = json.loads((engine.dir / "config.json").read_text())
    assert config["build_config"]["max_batch_size"] == 4
    assert str(tmp_path) not in (engine.dir / "config.json").read_text()
    beside = {path.name for path in engine.dir.parent.iterdir()}
    assert beside == {"engine", "checks.json", "stage.json"}


def test_engine_says_what_it_is(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engine = build(checkpoint, tmp_path)
    assert engine.format == "trtllm"
    assert engine.variant == "ada-trtllm-fp8-b4-s128-kv8"
    assert engine.runtime == ("tensorrt-llm", "1.2.1")
    assert engine.sms == (89,)
    plan_bytes = (engine.dir / "rank0.engine").stat().st_size
    assert engine.min_vram_bytes == plan_bytes + 2 * 3 * (2 * 16) * 1 * 128
    assert engine.serve_args == (
        *("--backend", "tensorrt"),
        *("--max_batch_size", "4"),
        *("--max_num_tokens", "256"),
    )
    assert engine.tools.items() >= {
        ("tensorrt-llm", "1.2.1"),
        ("tensorrt", "10.14.1.48"),
        *checkpoint.calibration["tools"].items(),
    }
    record = engine.checks["trtllm_build"]
    assert record["effective"]["build_config.plugin_config.use_fp8_context_fmha"] is True
    assert record["environment"]["driver"] == "590.44.01"
    assert record["environment"]["card"] == "NVIDIA-Ada"
    assert record["command"][0] == "trtllm-build"
    assert engine.checks["conversion"]["kv_cache_dtype"] == "fp8"


def test_second_time_comes_from_the_cache(checkpoint: Checkpoint, tmp_path: Path) -> None:
    first = build(checkpoint, tmp_path)
    (tmp_path / "logs" / "compile.log").unlink()
    assert build(checkpoint, tmp_path) == first
    assert not (tmp_path / "logs" / "compile.log").exists()


def test_other_card_or_release_is_built_anew(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(checkpoint, tmp_path)
    package_records(tmp_path / "other", tensorrt="10.14.2")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    build(checkpoint, tmp_path)
    assert len(finished(tmp_path)) == 2
    card_machine(tmp_path / "l4", monkeypatch, name="NVIDIA L4")
    compiler().compile(
        checkpoint,
        dataclasses.replace(ADA, card="NVIDIA-L4"),
        StageCache(root=tmp_path / "cache"),
        tmp_path / "logs",
    )
    assert len(finished(tmp_path)) == 3


def test_timing_cache_of_one_build_is_lent_to_the_next(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    build(checkpoint, tmp_path)
    build(checkpoint, tmp_path, compiler(max_batch_size=2))
    log = (tmp_path / "logs" / "compile.log").read_text()
    first, second = (line for line in log.splitlines() if line.startswith("$ ["))
    assert "--input_timing_cache" not in first
    assert "--input_timing_cache" in second
    (kept,) = (tmp_path / "cache" / "timing").glob("*/model.cache")
    assert kept.read_bytes() == b"entry\nentry\n"


@pytest.mark.parametrize("content", ["", "-"])
def test_build_without_timings_leaves_the_known_ones(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    build(checkpoint, tmp_path)
    monkeypatch.setenv("FAKE_TRTLLM", f"timings:{content}")
    build(checkpoint, tmp_path, compiler(max_batch_size=2))
    (kept,) = (tmp_path / "cache" / "timing").glob("*/*")
    assert kept.read_bytes() == b"entry\n"


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("set:pretrained_config.rotary_base=1.0", "rotary_base: asked 5000.0, got 1.0"),
        ("without:rank0.engine", r"wrote no rank0\.engine"),
    ],
)
def test_engine_that_differs_from_what_was_asked_is_no_engine(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    behaviour: str,
    message: str,
) -> None:
    monkeypatch.setenv("FAKE_TRTLLM", behaviour)
    with pytest.raises(PipelineError, match=message):
        build(checkpoint, tmp_path)
    assert finished(tmp_path) == []
    assert not (tmp_path / "cache" / "timing").exists()


@pytest.mark.parametrize(
    ("behaviour", "returncode", "message"),
    [
        ("say:RuntimeError: unheard of", 1, "unheard of"),
        ("say:[TRT] [E] Error Code 2: OutOfMemory", 1, "lower compiler.max_num_tokens"),
        ("kill", -9, "compiler.memory_gib"),
    ],
)
def test_failure_gives_code_log_last_lines_and_what_to_change(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    behaviour: str,
    returncode: int,
    message: str,
) -> None:
    monkeypatch.setenv("FAKE_TRTLLM", behaviour)
    with pytest.raises(ToolError, match=message) as caught:
        build(checkpoint, tmp_path)
    assert caught.value.stage == "compile"
    assert caught.value.returncode == returncode
    assert caught.value.log_path == tmp_path / "logs" / "compile.log"
    assert "TensorRT LLM version: 1.2.1" in str(caught.value)
    assert finished(tmp_path) == []


@pytest.mark.slow
def test_build_that_hangs_is_stopped_and_not_taken_for_out_of_memory(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TRTLLM", "hang")
    with pytest.raises(ToolError, match="stopped after 2 s") as caught:
        build(checkpoint, tmp_path, compiler(timeout_s=2.0))
    assert "memory" not in str(caught.value)
    assert finished(tmp_path) == []


@pytest.mark.parametrize("name", ["llama3.1", "mistral", "qwen2.5", "qwen3", "phi3"])
def test_every_architecture_goes_through(name: str, tmp_path: Path) -> None:
    quantized = architecture_checkpoint(tmp_path, name)
    built = compiler(kv_cache_dtype="bfloat16" if name == "qwen2.5" else "fp8")
    engine = build(quantized, tmp_path, built)
    config = json.loads((engine.dir / "config.json").read_text())["pretrained_config"]
    assert [config["architecture"]] == UnifiedCheckpoint(quantized.dir).config_json["architectures"]
    assert "Provided but not required" not in (tmp_path / "logs" / "compile.log").read_text()
