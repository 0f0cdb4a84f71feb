"""Tokens and logits from an engine that another process holds."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.errors import IncompatibleError, PipelineError, ToolError
from pipeline.core.values import Checkpoint, Engine
from pipeline.runners.trtllm import child
from pipeline.runners.trtllm.runner import TrtLlmRunner
from tests.quant.tiny_quantized import tiny_checkpoint
from tests.runners.trtllm.engines import PACKAGES, built_engine, runner_machine

VOCAB = 320
RUNNER = TrtLlmRunner(
    where="local",
    image="enginesmith-build:1.2.1",
    kv_cache_fraction=0.5,
    bench_rounds=1,
    bench_warmup=0,
    timeout_s=30.0,
)


def next_token(prompt: list[int]) -> int:
    """As the fake LLM computes it."""
    return (7 * sum(prompt) + len(prompt)) % VOCAB


def continued(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def engine(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    runner_machine(tmp_path / "machine", monkeypatch)
    return built_engine(checkpoint, tmp_path)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of the test's own, to see what stays in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    tempfile.tempdir = None


def test_logits_of_a_position_are_those_after_its_prefix(engine: Engine) -> None:
    tokens = [5, 3, 200, 7, 7]
    with RUNNER.open(engine) as session:
        logits = session.logits(tokens)
    assert logits.shape == (5, VOCAB)
    assert logits.dtype == np.float32
    wanted = [next_token(tokens[: end + 1]) for end in range(5)]
    assert logits.argmax(axis=-1).tolist() == wanted
    assert logits[0, wanted[0]] == 0.0


def test_generation_has_exactly_osl_tokens_for_each_prompt(engine: Engine) -> None:
    prompts = [[1, 2, 3], [4, 5, 6]]
    with RUNNER.open(engine) as session:
        first = session.generate(prompts, 4)
        second = session.generate(prompts, 2)
    assert first.tokens.tolist() == [continued(prompt, 4) for prompt in prompts]
    assert second.tokens.shape == (2, 2)
    assert first.total_s > 0 < first.ttft_s


def test_stream_ends_before_an_end_of_sequence_id(engine: Engine) -> None:
    tokens = continued([9, 9], 6)
    with RUNNER.open(engine) as session:
        assert list(session.stream([9, 9], 6, frozenset())) == tokens
        assert list(session.stream([9, 9], 6, frozenset({tokens[3]}))) == tokens[:3]


def test_tokens_that_come_slowly_come_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LLM", "slow")
    with RUNNER.open(engine) as session:
        assert list(session.stream([9, 9], 6, frozenset())) == continued([9, 9], 6)


def test_stream_that_is_left_early_is_cancelled_and_the_session_goes_on(engine: Engine) -> None:
    with RUNNER.open(engine) as session:
        stream = session.stream([1, 1], 100, frozenset())
        assert next(stream) == next_token([1, 1])
        stream.close()  # type: ignore[attr-defined]
        assert session.generate([[2]], 1).tokens.tolist() == [[next_token([2])]]


def test_nothing_stays_behind(engine: Engine, temporary: Path) -> None:
    threads = set(threading.enumerate())
    with RUNNER.open(engine) as session:
        session.logits([1, 2])
    assert list(temporary.iterdir()) == []
    assert set(threading.enumerate()) == threads


def test_fault_in_one_request_is_told_and_the_next_one_works(engine: Engine) -> None:
    with RUNNER.open(engine) as session:
        with pytest.raises(PipelineError, match=r"should not exceed max_seq_len \(128\)"):
            session.generate([[1] * 120], 9)
        assert session.generate([[1] * 120], 8).tokens.shape == (1, 8)


def test_fewer_tokens_than_asked_for_are_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLM", "short")
    with RUNNER.open(engine) as session:  # noqa: SIM117
        with pytest.raises(PipelineError, match=r"asked 1 requests for 4 tokens each.*\[3\]"):
            session.generate([[1, 2]], 4)


def test_engine_that_does_not_load_keeps_its_log(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    monkeypatch.setenv("FAKE_LLM", "no-load")
    with pytest.raises(ToolError, match="not compatible with this version"):
        RUNNER.open(engine).__enter__()
    (log,) = temporary.iterdir()
    assert log.suffix == ".log"
    assert "not compatible" in log.read_text()


def test_process_that_dies_ends_the_wait(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LLM", "die")
    with pytest.raises(ToolError) as caught, RUNNER.open(engine) as session:
        session.generate([[1]], 1)
    assert caught.value.returncode == 3


def test_interrupt_while_loading_ends_the_process(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    monkeypatch.setenv("FAKE_LLM", "slow-load")
    monkeypatch.setattr("pipeline.runners.trtllm.session._Running.check", _interrupt)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        RUNNER.open(engine).__enter__()
    assert time.monotonic() - started < 30
    assert list(temporary.iterdir()) == []


def _interrupt(_: object) -> None:
    raise KeyboardInterrupt


def test_process_whose_caller_is_gone_ends_by_itself(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "alive").touch()
    script = (
        "import sys, pathlib; import child; child.WATCH_S = 0.05; child.ALIVE_S = 0.3\n"
        "child.TrtLlmModel = lambda settings: None\n"
        "child.main(pathlib.Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(child.__file__).parent,
        env={"PYTHONPATH": str(Path(child.__file__).parent)},
        timeout=30,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "the caller is gone" in done.stdout
    assert (tmp_path / "ready").exists()


def test_child_needs_nothing_of_this_project(engine: Engine, tmp_path: Path) -> None:
    """It runs under the image's interpreter; only TensorRT-LLM's package is in reach."""
    folder = tmp_path / "channel"
    folder.mkdir()
    settings = {
        "engine_dir": str(engine.dir),
        "kv_cache_fraction": 0.5,
        "attention_window": None,
        "chunked_prefill": False,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "request-1.json").write_text(json.dumps({"kind": "logits", "tokens": [1, 2]}))
    (folder / "alive").touch()
    process = subprocess.Popen(
        [sys.executable, "-S", child.__file__, str(folder)],
        env={"PYTHONPATH": str(PACKAGES)},
        cwd=tmp_path,
    )
    end = time.monotonic() + 30
    while not (folder / "result-1.json").exists() and time.monotonic() < end:
        time.sleep(0.02)
    (folder / "stop").touch()
    assert process.wait(timeout=30) == 0
    assert json.loads((folder / "result-1.json").read_text()) == {"shape": [2, VOCAB]}


def test_cache_share_window_and_chunks_reach_the_runtime(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "seen.log"
    real = Path.unlink

    def keep(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".log":
            log.write_bytes(path.read_bytes())
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", keep)
    path = engine.dir / "config.json"
    config = json.loads(path.read_text())
    config["build_config"]["max_num_tokens"] = 64
    path.write_text(json.dumps(config))
    windowed = dataclasses.replace(engine, checks={"conversion": {"attention_window": 100}})
    with RUNNER.open(windowed):
        pass
    text = log.read_text()
    assert "'max_attention_window': [100]" in text
    assert "'free_gpu_memory_fraction': 0.5" in text
    assert "'enable_block_reuse': False" in text
    assert "chunked True" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "checkpoint"}, "runs trtllm engines, not checkpoint"),
        ({"runtime": ("tensorrt-llm", "1.2.0")}, r"is for tensorrt-llm 1\.2\.0, this runner is"),
        ({"sms": (90,)}, r"cannot run here: this needs a GPU with sm_90"),
    ],
)
def test_engine_that_cannot_run_here_says_why(
    engine: Engine, change: dict[str, object], message: str
) -> None:
    other = dataclasses.replace(engine, **change)  # type: ignore[arg-type]
    reason = RUNNER.why_not(other)
    assert reason is not None
    with pytest.raises(IncompatibleError, match=message):
        RUNNER.open(other)


def test_engine_of_this_machine_can_run(engine: Engine) -> None:
    assert RUNNER.why_not(engine) is None
