"""Runner trtllm: what it says in advance and loads an engine with."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from pipeline.core.errors import ToolError
from pipeline.core.values import Checkpoint, Engine
from tests.quant.tiny_quantized import tiny_checkpoint
from tests.runners.trtllm.engines import RUNNER, built_engine, runner_machine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def engine(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    runner_machine(tmp_path / "machine", monkeypatch)
    return built_engine(checkpoint, tmp_path)


@pytest.mark.parametrize(("window", "given"), [(100, "[100]"), (128, "None")])
def test_cache_share_window_and_chunks_reach_the_runtime(
    engine: Engine, temporary: Path, monkeypatch: pytest.MonkeyPatch, window: int, given: str
) -> None:
    """A window as wide as the engine's context needs none."""
    monkeypatch.setenv("FAKE_LLM", "die")  # so that its log stays
    path = engine.dir / "config.json"
    config = json.loads(path.read_text())
    config["build_config"]["max_num_tokens"] = 64
    path.write_text(json.dumps(config))
    windowed = dataclasses.replace(engine, checks={"conversion": {"attention_window": window}})
    with pytest.raises(ToolError) as caught, RUNNER.open(windowed) as session:
        session.generate([[1]], 1)
    assert caught.value.returncode == 3
    text = caught.value.log_path.read_text()
    assert f"'max_attention_window': {given}" in text
    assert "'free_gpu_memory_fraction': 0.9" in text
    assert "'enable_block_reuse': False" in text
    assert "chunked True" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "checkpoint"}, "does not run checkpoint engines"),
        ({"runtime": ("tensorrt-llm", "1.2.0")}, r"is for tensorrt-llm 1\.2\.0, this runner is"),
        ({"sms": (90,)}, r"cannot run here: this needs a GPU with sm_90"),
    ],
)
def test_engine_that_cannot_run_here_says_why(
    engine: Engine, change: dict[str, object], message: str
) -> None:
    assert RUNNER.why_not(engine) is None
    other = dataclasses.replace(engine, **change)  # type: ignore[arg-type]
    assert re.search(message, RUNNER.why_not(other) or "")
