"""What runner trtllm says in advance, and what it loads an engine with."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from pipeline.core.errors import ToolError
from pipeline.core.values import Checkpoint, Engine
from pipeline.runners.child import CHILDREN
from pipeline.runners.trtllm import TrtLlmRunner
from tests.quant.tiny_quantized import tiny_checkpoint
from tests.runners.trtllm.engines import built_engine, runner_machine

RUNNER = TrtLlmRunner(
    where="local",
    image="enginesmith-build:1.2.1",
    kv_cache_fraction=0.5,
    bench_rounds=1,
    bench_warmup=0,
    timeout_s=30.0,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def engine(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    runner_machine(tmp_path / "machine", monkeypatch)
    return built_engine(checkpoint, tmp_path)


def test_cache_share_window_and_chunks_reach_the_runtime(
    engine: Engine, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLM", "die")  # so that its log stays
    path = engine.dir / "config.json"
    config = json.loads(path.read_text())
    config["build_config"]["max_num_tokens"] = 64
    path.write_text(json.dumps(config))
    windowed = dataclasses.replace(engine, checks={"conversion": {"attention_window": 100}})
    with pytest.raises(ToolError) as caught, RUNNER.open(windowed) as session:
        session.generate([[1]], 1)
    assert caught.value.returncode == 3
    text = caught.value.log_path.read_text()
    assert "'max_attention_window': [100]" in text
    assert "'free_gpu_memory_fraction': 0.5" in text
    assert "'enable_block_reuse': False" in text
    assert "chunked True" in text


def test_child_files_import_nothing_of_this_package_at_the_top() -> None:
    """They run under the image's interpreter, which has TensorRT-LLM and not this package."""
    for name in ("main.py", "vllm_model.py", "trtllm_model.py"):
        lines = (CHILDREN / name).read_text().splitlines()
        assert not [line for line in lines if "import" in line and "pipeline" in line.split()]
        assert not [line for line in lines if line.startswith(("from pipeline", "import pipeline"))]


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
