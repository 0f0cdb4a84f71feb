from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from pipeline.core.cache import StageCache
from pipeline.core.values import Checkpoint
from pipeline.formats.checkpoint.compiler import CheckpointCompiler
from pipeline.quant.unified import UnifiedCheckpoint
from tests.quant.tiny_quantized import ADA, architecture_checkpoint, tiny_checkpoint

FIELDS: dict[str, Any] = {
    "max_batch_size": 4,
    "max_seq_len": 128,
    "max_num_tokens": 256,
    "kv_cache_dtype": "fp8",
    "runtime": "vllm",
    "runtime_version": "0.1.0",
}
FP8_CACHE = CheckpointCompiler(**FIELDS)
BF16_CACHE = CheckpointCompiler(**{**FIELDS, "kv_cache_dtype": "bfloat16"})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def checkpoint(root: Path) -> Checkpoint:
    return tiny_checkpoint(root)


@pytest.mark.parametrize(("compiler", "algo"), [(FP8_CACHE, "FP8"), (BF16_CACHE, None)])
def test_cache_type_is_declared_where_runtimes_look(
    root: Path, checkpoint: Checkpoint, compiler: CheckpointCompiler, algo: str | None
) -> None:
    engine = compiler.compile(checkpoint, ADA, StageCache(root=root / "cache"), root)
    declared = json.loads((engine.dir / "hf_quant_config.json").read_text())["quantization"]
    assert declared["kv_cache_quant_algo"] == algo
    assert declared["quant_algo"] == "FP8"
    original = json.loads((checkpoint.dir / "hf_quant_config.json").read_text())["quantization"]
    assert original["kv_cache_quant_algo"] is None


def test_engine_is_the_checkpoint_without_our_own_records(
    root: Path, checkpoint: Checkpoint
) -> None:
    engine = FP8_CACHE.compile(checkpoint, ADA, StageCache(root=root / "cache"), root)
    names = {path.name for path in engine.dir.iterdir()}
    records = {"calibration.json", "stage.json"}
    assert names == {path.name for path in checkpoint.dir.iterdir()} - records
    changed = {"hf_quant_config.json", "config.json", "model.safetensors"}  # lm_head is untied
    for name in names - changed:
        assert (engine.dir / name).read_bytes() == (checkpoint.dir / name).read_bytes()


def test_tied_lm_head_is_stored_for_vllm_and_nothing_else_changes(
    root: Path, checkpoint: Checkpoint
) -> None:
    engine = FP8_CACHE.compile(checkpoint, ADA, StageCache(root=root / "cache"), root)
    packed, source = UnifiedCheckpoint(engine.dir), UnifiedCheckpoint(checkpoint.dir)
    assert packed.config_json["tie_word_embeddings"] is False
    assert set(packed.tensors) - set(source.tensors) == {"lm_head.weight"}
    for name in source.tensors:
        assert packed.read(name).tobytes() == source.read(name).tobytes()
    head, embedding = packed.read("lm_head.weight"), packed.read("model.embed_tokens.weight")
    assert head.tobytes() == embedding.tobytes()


def test_cache_scales_of_qwen_have_the_names_that_its_loader_takes(root: Path) -> None:
    checkpoint = architecture_checkpoint(root / "qwen", "qwen3")
    engine = FP8_CACHE.compile(checkpoint, ADA, StageCache(root=root / "cache"), root)
    source, packed = UnifiedCheckpoint(checkpoint.dir), UnifiedCheckpoint(engine.dir)
    shard = engine.dir / "model.safetensors"
    for name in source.tensors:
        other = name.replace(".k_proj.k_scale", ".k_scale").replace(".v_proj.v_scale", ".v_scale")
        assert packed.read(other).tobytes() == source.read(name).tobytes()
        assert (name == other) == (not name.endswith((".k_scale", ".v_scale")))
    with safe_open(shard, framework="pt") as stream:
        assert set(stream.keys()) == set(packed.tensors)
    packed.check_tensors()


def test_engine_says_what_it_is_and_how_it_is_served(root: Path, checkpoint: Checkpoint) -> None:
    cache = StageCache(root=root / "cache")
    limits = (
        *("--max-model-len", "128"),
        *("--max-num-seqs", "4"),
        *("--max-num-batched-tokens", "256"),
    )
    engine = BF16_CACHE.compile(checkpoint, ADA, cache, root)
    assert engine.serve_args == limits
    engine = FP8_CACHE.compile(checkpoint, ADA, cache, root)
    assert engine.serve_args == (*limits, "--kv-cache-dtype", "fp8")
    assert engine.format == "checkpoint"
    assert engine.sms == ()
    assert engine.runtime == ("vllm", "0.1.0")
    weight_bytes = (engine.dir / "model.safetensors").stat().st_size
    assert engine.min_vram_bytes == weight_bytes + 2 * 3 * (2 * 16) * 1 * 128
    assert engine.tools == checkpoint.calibration["tools"]


def test_same_bytes_serve_every_card_and_every_limit() -> None:
    assert FP8_CACHE.inputs(dataclasses.replace(ADA, sm=90)) == FP8_CACHE.inputs(ADA)
    assert BF16_CACHE.inputs(ADA) != FP8_CACHE.inputs(ADA)
