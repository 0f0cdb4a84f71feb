"""The checkpoint itself as the engine: what vLLM, SGLang and TensorRT-LLM >= 1.3 load directly."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.cache import Stage, StageCache
from pipeline.core.hardware import Target
from pipeline.core.settings import STRICT
from pipeline.core.values import Checkpoint, Engine, Format, Limits
from pipeline.formats.checkpoint.spec import SPEC
from pipeline.quant.spec import KV_CACHE_DTYPES, SHAPING_CODE
from pipeline.quant.unified import declare_cache

STAGE = Stage(name="pack", version=1, code=("pipeline.formats.checkpoint", *SHAPING_CODE))

_NOT_SERVED = frozenset({"calibration.json", "stage.json"})


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointCompiler:
    """Packs the unified checkpoint for `runtime`, which compiles nothing ahead of time.

    The sizes are what its server is told; an `fp8` cache uses the checkpoint's calibrated scales.
    """

    format: ClassVar[Format] = SPEC.name

    max_batch_size: PositiveInt
    max_seq_len: PositiveInt
    max_num_tokens: PositiveInt
    kv_cache_dtype: Literal["bfloat16", "fp8"]
    runtime: str
    runtime_version: str

    @property
    def limits(self) -> Limits:
        return Limits(
            max_batch_size=self.max_batch_size,
            max_seq_len=self.max_seq_len,
            max_num_tokens=self.max_num_tokens,
            kv_cache_dtype=self.kv_cache_dtype,
        )

    @property
    def pinned_runtime(self) -> tuple[str, str]:
        return self.runtime, self.runtime_version

    def check_machine(self, target: Target) -> None:
        """Any machine will do."""

    def inputs(self, target: Target) -> dict[str, Any]:
        return {**STAGE.identity, "kv_cache_dtype": self.kv_cache_dtype}

    def compile(
        self, checkpoint: Checkpoint, target: Target, cache: StageCache, log_dir: Path
    ) -> Engine:
        result = cache.run(
            STAGE,
            {"checkpoint": checkpoint.digest, **self.inputs(target)},
            lambda out: self._produce(checkpoint.dir, out / "engine"),
        )
        return SPEC.engine(
            self,
            checkpoint,
            target,
            result.dir / "engine",
            tools=dict(checkpoint.calibration["tools"]),
            checks={"quantized_linears": len(checkpoint.quantized_linears)},
        )

    def _produce(self, checkpoint_dir: Path, engine_dir: Path) -> None:
        """Copy the checkpoint; an FP8 cache is declared where runtimes look for it."""
        engine_dir.mkdir()
        for path in sorted(checkpoint_dir.iterdir()):
            if path.is_file() and path.name not in _NOT_SERVED:
                shutil.copyfile(path, engine_dir / path.name)
        _untie(engine_dir)
        _rename_cache_scales(engine_dir)
        if quant_algo := KV_CACHE_DTYPES[self.kv_cache_dtype].quant_algo:
            declare_cache(engine_dir, quant_algo)


def _untie(engine_dir: Path) -> None:
    """Store lm_head beside a tied embedding; the copy costs vocab x hidden x 2 bytes.

    vLLM 0.24 gives an lm_head that is excluded from a ModelOpt checkpoint's quantization a method
    without `tie_weights`, so that every tied model fails to load (NotImplementedError in
    `base_config.py`, seen on an H100, 2026-11-24).
    """
    from safetensors.torch import load_file, save_file

    path = engine_dir / "config.json"
    config = json.loads(path.read_text())
    if not config.get("tie_word_embeddings", False):
        return
    embedding = "model.embed_tokens.weight"
    for shard in sorted(engine_dir.glob("*.safetensors")):
        tensors = load_file(shard)
        if embedding in tensors:
            tensors["lm_head.weight"] = tensors[embedding].clone()
            save_file(tensors, shard, metadata={"format": "pt"})
            for index_path in engine_dir.glob("*.safetensors.index.json"):
                index = json.loads(index_path.read_text())
                index["weight_map"]["lm_head.weight"] = shard.name
                index_path.write_text(json.dumps(index, indent=2) + "\n")
    config["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2) + "\n")


def _rename_cache_scales(engine_dir: Path) -> None:
    """Call the scales of Qwen's FP8 cache `self_attn.k_scale`, not `self_attn.k_proj.k_scale`.

    vLLM 0.24's loader of Qwen2 and Qwen3 takes ModelOpt's names for shards of its fused linear and
    fails (TypeError in `KVCacheScaleParameter.weight_loader`, seen on an H200, 2026-12-01). These
    names its `maybe_remap_kv_scale_name` knows, too. A header keeps its size: they are shorter.
    """
    config = json.loads((engine_dir / "config.json").read_text())
    if not {"Qwen2ForCausalLM", "Qwen3ForCausalLM"} & set(config["architectures"]):
        return
    for shard in engine_dir.glob("*.safetensors"):
        with shard.open("r+b") as stream:
            (size_bytes,) = struct.unpack("<Q", stream.read(8))
            header = _CACHE_SCALE.sub(rb"\1", stream.read(size_bytes))
            stream.seek(8)
            stream.write(header.ljust(size_bytes))
    for path in engine_dir.glob("*.safetensors.index.json"):
        path.write_bytes(_CACHE_SCALE.sub(rb"\1", path.read_bytes()))


_CACHE_SCALE = re.compile(rb"(?<=\.self_attn\.)[kv]_proj\.([kv]_scale)(?=\")")


KIND = CheckpointCompiler
