"""`enginesmith export-trtllm`: one checkpoint folder in, one TensorRT-LLM checkpoint folder out.

For checkpoints of any origin: ours, or what ModelOpt's `export_hf_checkpoint` writes by itself,
with scales that differ inside a fused group, and with or without scales of the KV cache.

    export = plan_export(checkpoint_dir, out_dir, max_batch_size=64)   # every refusal, no work
    record = export.write()
"""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.cache import atomic_folder
from pipeline.core.data import shipped
from pipeline.core.errors import ConflictError, Fault, NotFoundError, RecipeError
from pipeline.core.values import Limits
from pipeline.formats.trtllm.build_tool import TIMING_CACHE_FILE, Plugins, build_command
from pipeline.formats.trtllm.convert import write_checkpoint
from pipeline.formats.trtllm.layout import Dtype
from pipeline.quant.unified import UnifiedCheckpoint, copy_companions, declared_quantization

log = logging.getLogger(__name__)

_SEQ_LEN, _NUM_TOKENS = 4096, 8192  # as in conf/compiler/trtllm.yaml


@dataclass(frozen=True, kw_only=True)
class Export:
    """An export that nothing speaks against so far; `command` is quoted for a shell."""

    checkpoint_dir: Path
    out_dir: Path
    architecture: str
    dtype: Dtype
    kv_cache_dtype: str
    command: str

    def write(self) -> dict[str, Any]:
        """Convert into `out_dir`, which appears when it is complete, with the companion files.

        Raises:
            ConflictError: The folder was filled meanwhile.
        """
        with atomic_folder(self.out_dir) as private:
            kv_fp8 = self.kv_cache_dtype == "fp8"
            record = write_checkpoint(self.checkpoint_dir, private, dtype=self.dtype, kv_fp8=kv_fp8)
            copy_companions(self.checkpoint_dir, private)
            inode = private.stat().st_ino
        if self.out_dir.stat().st_ino != inode:
            raise ConflictError(f"{self.out_dir} was filled meanwhile; nothing was written to it")
        counts = record["quantized_linears"], len(record["kept_16bit"])
        types = self.dtype, self.kv_cache_dtype
        log.info("%s: %d FP8 linears, %d in %s, KV cache %s", self.out_dir, *counts, *types)
        return record


def plan_export(
    checkpoint_dir: Path,
    out_dir: Path,
    *,
    kv_cache_dtype: str | None = None,
    dtype: Dtype = "bfloat16",
    max_batch_size: int = 64,
    max_seq_len: int | None = None,
    max_num_tokens: int | None = None,
) -> Export:
    """Check what can be checked before anything is converted.

    `kv_cache_dtype` None takes what the checkpoint declares. `max_seq_len` None is the least of the
    model's context, its window and 4096. `max_num_tokens` None is 8192; it is lowered to that of
    all requests, but not below a block of the paged cache, to which `trtllm-build` would raise it.
    """
    if not (checkpoint_dir / "config.json").is_file():
        raise NotFoundError(
            f"{checkpoint_dir} holds no config.json; name the folder of a unified FP8 checkpoint"
        )
    place = _replaceable(out_dir)
    spec = UnifiedCheckpoint(checkpoint_dir).spec
    cache_dtype = kv_cache_dtype or _declared_cache(checkpoint_dir, dtype)
    plugins = Plugins(**shipped("compiler/trtllm")["plugins"])
    context = spec.max_position_embeddings
    length = max_seq_len or min(context, spec.window or context, _SEQ_LEN)
    tokens = min(max_num_tokens or _NUM_TOKENS, max_batch_size * length)
    faults = []
    if cache_dtype not in {"fp8", dtype}:
        message = f"is {cache_dtype}; beside dtype {dtype} it is fp8 or {dtype}"
        faults.append(Fault("--kv-cache-dtype", message))
    if tokens < max_batch_size:
        message = f"({tokens}) must be >= max_batch_size ({max_batch_size}); increase it"
        faults.append(Fault("max_num_tokens", message))
    if length > context:
        message = f"({length}) is beyond the model's context ({context}); lower it"
        faults.append(Fault("max_seq_len", message))
    if faults:
        raise RecipeError(faults)
    limits = Limits(
        max_batch_size=max_batch_size,
        max_seq_len=length,
        max_num_tokens=max(tokens, plugins.tokens_per_block),
        kv_cache_dtype=cache_dtype,
    )
    command = build_command(
        limits,
        plugins,
        checkpoint_dir=str(out_dir),
        engine_dir=f"{out_dir}-engine",
        timing_cache_out=f"{out_dir}-engine.{TIMING_CACHE_FILE}",
    )
    return Export(
        checkpoint_dir=checkpoint_dir,
        out_dir=place,
        architecture=spec.architecture,
        dtype=dtype,
        kv_cache_dtype=cache_dtype,
        command=shlex.join(command),
    )


def _replaceable(out_dir: Path) -> Path:
    """The folder without links; an empty one is removed and made again, to see that it can be."""
    place = out_dir.resolve()
    below = next(parent for parent in place.parents if parent.exists())
    if not below.is_dir():
        raise RecipeError([Fault("OUT_DIR", f"{out_dir} is below {below}, which is a file")])
    if not place.exists():
        return place
    if not place.is_dir() or any(place.iterdir()):
        raise ConflictError(f"{out_dir} exists and is not empty; name a new folder")
    reason = "it is the current folder" if place == Path.cwd() else ""
    try:
        if not reason:
            mode = place.stat().st_mode
            place.rmdir()
            place.mkdir(mode & 0o7777)
    except OSError as error:  # a mount point, or in a folder of another user
        reason = str(error.strerror)
    if reason:
        message = (
            f"{out_dir} cannot be replaced by the finished folder ({reason}); name a new folder "
            f"in it, such as {out_dir / 'checkpoint'}"
        )
        raise RecipeError([Fault("OUT_DIR", message)])
    return place


def _declared_cache(checkpoint_dir: Path, dtype: Dtype) -> str:
    """The cache's type where none is chosen."""
    declared = declared_quantization(checkpoint_dir)
    if declared.kv_cache not in {None, "FP8"}:
        message = (
            f"is {declared.kv_cache}, which is not converted; choose fp8 or a 16-bit type with "
            "--kv-cache-dtype"
        )
        raise RecipeError([Fault(f"{declared.file}: kv_cache_quant_algo", message)])
    return "fp8" if declared.kv_cache else dtype
