"""A package of any bytes, for the benchmarks of registries."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.values import Engine, Licence, Limits, Package, Weights
from pipeline.registry.manifest import Label
from pipeline.registry.package import seal


def seal_folder(engine_dir: Path, staging: Path) -> Package:
    """Seal the files of `engine_dir` as a checkpoint package in the empty folder `staging`."""
    engine = Engine(
        dir=engine_dir,
        digest="e" * 64,
        format="checkpoint",
        variant="any-checkpoint-fp8",
        runtime=("vllm", "0.29"),
        sms=(),
        limits=Limits(
            max_batch_size=8, max_seq_len=1024, max_num_tokens=1024, kv_cache_dtype="bfloat16"
        ),
        min_vram_bytes=1 << 30,
        tools={},
    )
    weights = Weights(
        dir=engine_dir, origin="random", commit=None, files=(), licence=Licence(spdx="CC0-1.0")
    )
    label = Label(name="bench", version="1.0-bbbbbbbbbbbb", build_key="b" * 64, config={})
    return seal(staging, engine, weights, label)
