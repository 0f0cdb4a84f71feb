"""What every contender starts vLLM with, as vLLM itself is told."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.acceptance.race.vllm_contenders import (
    OVERHEAD_BYTES,
    VLLM_PEERS,
    cache_bytes,
    ours_in_vllm,
    shared_arguments,
    vllm_peer,
)
from pipeline.core.errors import ToolError
from pipeline.core.values import Engine, Limits
from pipeline.runners.vllm.session import Timeouts
from pipeline.runners.workload import Workload
from tests.specs import shape

PACKAGES = Path(__file__).parents[2] / "runners" / "vllm" / "fake_packages"
TIMES = Timeouts(load_s=30.0, answer_s=30.0)
SHAPE = shape("phi3")
LOADS = tuple(
    Workload(name=f"b{batch}", batch=batch, isl=128, osl=256) for batch in (1, 8, 64, 128)
)
BLOCKS = int(1.1 * 128 * 24) + 1
"""128 requests of 384 tokens are 24 blocks of 16 each; a tenth more, rounded up."""


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    return Engine(
        dir=folder,
        digest="0" * 64,
        format="checkpoint",
        variant="any-checkpoint-fp8-kv8",
        runtime=("vllm", "0.24.0"),
        sms=(),
        limits=Limits(
            max_batch_size=128, max_seq_len=1024, max_num_tokens=8192, kv_cache_dtype="fp8"
        ),
        min_vram_bytes=0,
        serve_args=(
            *("--max-model-len", "1024", "--max-num-seqs", "128"),
            *("--max-num-batched-tokens", "8192", "--kv-cache-dtype", "fp8"),
        ),
    )


@pytest.fixture
def weights_dir(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "model.safetensors").write_bytes(b"x" * 2000)
    return tmp_path / "source"


def test_every_engine_is_told_what_the_race_promises(
    engine: Engine, weights_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen.jsonl"
    monkeypatch.setenv("PYTHONPATH", str(PACKAGES))
    monkeypatch.setenv("FAKE_VLLM_SEEN", str(seen))
    monkeypatch.setattr(tempfile, "tempdir", None)
    peers = [vllm_peer(name, weights_dir, engine, SHAPE, LOADS, TIMES) for name in VLLM_PEERS]
    for contender in (ours_in_vllm(engine, SHAPE, LOADS, TIMES), *peers):
        with contender.open(tmp_path / f"{contender.name}.log") as session:
            assert session.generate([[1, 2, 3]], 4).tokens.shape == (1, 4)
        assert (tmp_path / f"{contender.name}.log").read_text().startswith("$ [")
    told: list[dict[str, Any]] = [json.loads(line) for line in seen.read_text().splitlines()]
    same = {
        "max_model_len": 1024,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 8192,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_logprobs": -1,
        "gpu_memory_utilization": 0.05,
        "disable_log_stats": False,
    }
    small, large = (BLOCKS * 16 * 2 * 32 * 32 * 96 * element for element in (1, 2))
    differ = [
        (engine.dir, "auto", None, "fp8", small),
        (weights_dir, "bfloat16", None, "auto", large),
        (weights_dir, "bfloat16", "fp8", "auto", large),
        (weights_dir, "bfloat16", "fp8", "fp8", small),
    ]
    assert told == [
        {
            **same,
            "model": str(folder),
            "dtype": dtype,
            "quantization": quantization,
            "kv_cache_dtype": cache_dtype,
            "kv_cache_memory_bytes": size,
        }
        for folder, dtype, quantization, cache_dtype, size in differ
    ]


def test_a_16_bit_cache_of_ours_is_told_and_counted(engine: Engine) -> None:
    limits = dataclasses.replace(engine.limits, kv_cache_dtype="bfloat16")
    plain = dataclasses.replace(
        engine, limits=limits, serve_args=shared_arguments(engine.serve_args)
    )
    ours = ours_in_vllm(plain, SHAPE, LOADS, TIMES)
    assert "--kv-cache-dtype" not in ours.arguments
    assert "16-bit KV cache" in ours.label
    assert ours.memory_bytes == 1000 + cache_bytes(SHAPE, LOADS, plain, 2) + OVERHEAD_BYTES


def test_the_cache_holds_one_request_of_full_length_at_least(engine: Engine) -> None:
    short = (Workload(name="b1", batch=1, isl=8, osl=8),)
    token_bytes = SHAPE.kv_bytes(1, 1)
    assert cache_bytes(SHAPE, short, engine, 1) >= 1024 * token_bytes


def test_a_peer_that_vllm_refuses_is_an_error_with_its_last_words(
    engine: Engine, weights_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PACKAGES))
    monkeypatch.setenv("FAKE_VLLM", "refuse-fp8")
    peer = vllm_peer("vllm-fp8", weights_dir, engine, SHAPE, LOADS, TIMES)
    log_path = tmp_path / "log"
    with (
        pytest.raises(ToolError, match="no kernel for this quantization"),
        peer.open(log_path),
    ):
        pass
    assert log_path.is_file()
