"""Runner trtllm: what it says in advance and loads an engine with; speed by `trtllm-bench`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import operator
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import PipelineError, RecipeError, ToolError
from pipeline.core.values import Checkpoint, Engine
from pipeline.runners.runner import BenchResult
from pipeline.runners.trtllm import mode_of, percentiles, write_model_dir
from pipeline.runners.workload import Workload
from tests.quant.tiny_quantized import tiny_checkpoint
from tests.runners.trtllm.engines import RUNNER, built_engine, runner_machine

OPTIONS: dict[str, Any] = json.loads(
    Path(__file__).with_name("trtllm_bench_options.json").read_text()
)
B4 = Workload(name="b4", batch=4, isl=16, osl=8, min_output_tokens_per_s=312.0)
B1 = Workload(name="b1", batch=1, isl=16, osl=8)


@pytest.mark.parametrize("workload", [B1, B4], ids=["latency", "throughput"])
def test_every_option_is_one_that_release_1_2_takes(workload: Workload) -> None:
    folders = ("/mnt/input", "/mnt/output", "/mnt/engine")
    line = list(RUNNER.bench_command(workload, *folders, options=True)[1:])
    mode = mode_of(workload)
    pairs = dict(itertools.pairwise(line))
    assert pairs["--num_requests"] == str(2 * workload.batch)
    assert pairs["--concurrency"] == str(workload.batch)
    assert (pairs["--warmup"], pairs["--kv_cache_free_gpu_mem_fraction"]) == ("2", "0.9")
    assert pairs.get("--eos_id") == ("-1" if mode == "throughput" else None)
    split = line.index(mode)
    for known, part in ((OPTIONS["global"], line[:split]), (OPTIONS[mode], line[split + 1 :])):
        while part:
            kind = known[part.pop(0)]
            if kind.get("type") == "switch":
                continue
            value = part.pop(0)
            assert "choices" not in kind or value in kind["choices"]
            assert kind.get("type") != "int" or value.lstrip("-").isdigit()


def test_dataset_is_the_workload_and_always_the_same(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    RUNNER.write_dataset(first, B4, 320, seed=1)
    RUNNER.write_dataset(second, B4, 320, seed=1)
    RUNNER.write_dataset(other, B4, 320, seed=2)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    requests = [json.loads(line) for line in first.read_text().splitlines()]
    assert [request["task_id"] for request in requests] == list(range(8))
    assert {len(request["input_ids"]) for request in requests} == {16}
    assert {request["output_tokens"] for request in requests} == {8}
    assert all(0 <= token < 320 for request in requests for token in request["input_ids"])
    assert requests[0]["input_ids"] == list(B4.request_prompts(320, 1)[0])
    assert len({tuple(request["input_ids"]) for request in requests}) == 8


REPORT: dict[str, Any] = {
    "engine": {"backend": "TRT", "version": "1.2.1", "quantization": "FP8"},
    "world_info": {"world_size": 1, "max_batch_size": 4},
    "request_info": {"num_requests": 8, "avg_input_length": 16.0, "avg_output_length": 8.0},
    "performance": {
        "system_output_throughput_tok_s": 400.0,
        "request_latency_percentiles_ms": {"p50": 90.0, "p90": 91.0, "p95": 92.0, "p99": 93.0},
    },
    "streaming_metrics": {
        "avg_ttft_ms": 20.5,
        "avg_tpot_ms": 9.25,
        "ttft_percentiles": {"p50": 20.0, "p90": 21.0, "p99": 22.0},
        "tpot_percentiles": {"p50": 9.0, "p90": 9.5, "p99": 9.9},
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    document = copy.deepcopy(REPORT)
    *parents, last = path.split(".")
    functools.reduce(operator.getitem, parents, document)[last] = value
    return document


def test_report_becomes_the_pipelines_own_figures() -> None:
    sample = RUNNER.read_report(REPORT, B4, "FP8")
    assert sample == {"output_tokens_per_s": 400.0, "ttft_ms": 20.5, "itl_ms": 9.25}
    assert percentiles(REPORT)["itl_ms"] == {"p50": 9.0, "p90": 9.5, "p99": 9.9}
    assert percentiles({}) == {}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("engine.backend", "Pytorch"),
        ("world_info.max_batch_size", 3),
        ("request_info.num_requests", 7),
        ("request_info.avg_output_length", 7.5),
        ("performance.system_output_throughput_tok_s", float("nan")),
        ("streaming_metrics.avg_ttft_ms", None),
        ("streaming_metrics", None),
    ],
)
def test_report_of_another_run_is_refused(path: str, value: Any) -> None:
    with pytest.raises(
        PipelineError, match=path.split(".")[-1] if value is not None else "is None"
    ):
        RUNNER.read_report(changed(path, value), B4, "FP8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def engine(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    runner_machine(tmp_path / "machine", monkeypatch)
    return built_engine(checkpoint, tmp_path)


def bench(engine: Engine, checkpoint: Checkpoint, folder: Path, load: Workload) -> BenchResult:
    log_path = folder / "bench.log"
    return RUNNER.bench(
        engine, load, checkpoint_dir=checkpoint.dir, repeats=2, seed=3, log_path=log_path
    )


@pytest.mark.parametrize("workload", [B1, B4], ids=["latency", "throughput"])
def test_run_gives_the_figures_of_each_repeat(
    engine: Engine, checkpoint: Checkpoint, tmp_path: Path, workload: Workload
) -> None:
    found = bench(engine, checkpoint, tmp_path, workload)
    assert found.runs == ({"output_tokens_per_s": 400.0, "ttft_ms": 20.0, "itl_ms": 9.5},) * 2
    assert found.requests == workload.batch * 2
    assert found.tool == f"trtllm-bench 1.2.1 {mode_of(workload)}"
    assert found.percentiles["ttft_ms"]["p99"] == 5.0


def test_model_folder_has_what_the_tool_reads_and_no_weights(
    engine: Engine, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((checkpoint.dir / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_phi3.Phi3Config"}
    (source / "config.json").write_text(json.dumps(config))
    write_model_dir(tmp_path / "model", source, engine.dir)

    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    loaded = AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert loaded.num_hidden_layers == 3
    assert AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=True)("x")
    with safe_open(tmp_path / "model" / "model.safetensors", "np") as weights:
        assert list(weights.keys()) == ["unused"]


def test_sliding_window_reaches_the_runtime(
    engine: Engine, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    windowed = dataclasses.replace(
        engine, checks={**engine.checks, "conversion": {"attention_window": 64}}
    )
    bench(windowed, checkpoint, tmp_path, B4)
    assert '"max_attention_window": [64]' in (tmp_path / "bench.log").read_text()
    wide = dataclasses.replace(engine, checks={"conversion": {"attention_window": 128}})
    (tmp_path / "bench.log").unlink()
    bench(wide, checkpoint, tmp_path, B4)
    assert "max_attention_window" not in (tmp_path / "bench.log").read_text()


@pytest.mark.parametrize(
    ("behaviour", "error", "shown"),
    [
        ("no-report", PipelineError, "wrote no report"),
        ("say:something broke", ToolError, "something broke"),
    ],
)
def test_tool_that_fails_gives_no_figures(
    engine: Engine,
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    behaviour: str,
    error: type[Exception],
    shown: str,
) -> None:
    monkeypatch.setenv("FAKE_BENCH", behaviour)
    with pytest.raises(error, match=shown):
        bench(engine, checkpoint, tmp_path, B4)


def test_answers_of_one_token_are_refused_before_loading(
    engine: Engine, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="osl must be 2 or more"):
        bench(engine, checkpoint, tmp_path, dataclasses.replace(B4, osl=1))
    assert not (tmp_path / "bench.log").exists()


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
