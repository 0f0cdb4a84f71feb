"""`enginesmith export-trtllm`: one checkpoint folder in, one TensorRT-LLM checkpoint folder out.

For checkpoints of any origin: ours, or what ModelOpt's `export_hf_checkpoint` writes by itself,
with scales that differ inside a fused group, and with or without scales of the KV cache.
"""

from __future__ import annotations

import json
import logging
import shlex
from dataclasses import fields
from pathlib import Path

from pipeline.core.atomic_folder import atomic_folder
from pipeline.core.data import shipped
from pipeline.core.errors import ConflictError, Fault, NotFoundError, RecipeError
from pipeline.formats.trtllm.command import (
    TIMING_CACHE_FILE,
    BuildPaths,
    BuildSizes,
    build_command,
)
from pipeline.formats.trtllm.convert.config import Dtype
from pipeline.formats.trtllm.convert.stage import (
    ConversionRecord,
    KvCacheDtype,
    TrtLlmSettings,
    write_checkpoint,
)
from pipeline.formats.trtllm.plugins import Plugins
from pipeline.plan.known_bad import When, known_bad_table
from pipeline.quant.export import copy_companions
from pipeline.quant.unified import UnifiedCheckpoint

log = logging.getLogger(__name__)

_SEQ_LEN = 4096
_NUM_TOKENS = 8192
"""Sizes of the printed command unless told otherwise, as in `conf/compiler/trtllm.yaml`."""


def export_trtllm(
    checkpoint_dir: Path,
    out_dir: Path,
    *,
    kv_cache_dtype: KvCacheDtype | None = None,
    dtype: Dtype = "bfloat16",
    tp_size: int = 1,
    pp_size: int = 1,
) -> ConversionRecord:
    """Convert `checkpoint_dir` into `out_dir`, which appears when it is complete.

    Tokenizer, generation config, chat template and licence files come along.

    Args:
        checkpoint_dir: Unified FP8 checkpoint.
        out_dir: A new or empty folder.
        kv_cache_dtype: None takes what the checkpoint declares. Ours declare 16 bits and hold the
            scales for `fp8`.
        dtype: Type of activations and of tensors that are not FP8.
        tp_size: Must be 1.
        pp_size: Must be 1.

    Raises:
        NotFoundError: There is no checkpoint.
        ConflictError: `out_dir` exists and is not empty.
        RecipeError: TensorRT-LLM cannot express the model or the checkpoint, or is known to fail.
        CorruptError: The checkpoint is damaged.
    """
    checkpoint = _open(checkpoint_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConflictError(f"{out_dir} exists and is not empty; name a new folder")
    if kv_cache_dtype is None:
        kv_cache_dtype = "fp8" if declares_fp8_cache(checkpoint_dir) else dtype
    if kv_cache_dtype not in {"fp8", dtype}:
        raise RecipeError(
            [
                Fault(
                    "kv_cache_dtype",
                    f"is {kv_cache_dtype}; beside dtype {dtype} it is fp8 or {dtype}",
                )
            ]
        )
    settings = TrtLlmSettings(
        kv_cache_dtype=kv_cache_dtype, dtype=dtype, tp_size=tp_size, pp_size=pp_size
    )
    if kv_cache_dtype == "fp8":
        _check_known_bad(checkpoint.spec.architecture)
    with atomic_folder(out_dir) as private:
        record = write_checkpoint(checkpoint_dir, settings, private)
        copy_companions(checkpoint_dir, private)
        inode = private.stat().st_ino
    if out_dir.stat().st_ino != inode:
        raise ConflictError(f"{out_dir} was filled meanwhile; nothing was written to it")
    log.info(
        "%s: %d FP8 linears, %d in %s, KV cache %s",
        out_dir,
        record.quantized_linears,
        len(record.kept_16bit),
        record.dtype,
        record.kv_cache_dtype,
    )
    return record


def declares_fp8_cache(checkpoint_dir: Path) -> bool:
    """Whether a checkpoint declares an FP8 KV cache, in either of the files that ModelOpt writes.

    Raises:
        RecipeError: It declares a cache that is neither FP8 nor 16-bit.
    """
    declared = checkpoint_dir / "hf_quant_config.json"
    if declared.is_file():
        algo = json.loads(declared.read_text()).get("quantization", {}).get("kv_cache_quant_algo")
    else:
        config = json.loads((checkpoint_dir / "config.json").read_text())
        scheme = (config.get("quantization_config") or {}).get("kv_cache_scheme")
        algo = None
        if scheme:
            float8 = scheme.get("type") == "float" and scheme.get("num_bits") == 8
            algo = "FP8" if float8 else f"{scheme}"
    if algo not in {None, "FP8"}:
        raise RecipeError(
            [
                Fault(
                    "kv_cache_quant_algo",
                    f"is {algo}, which is not converted; choose fp8 or a 16-bit type with "
                    "--kv-cache-dtype",
                )
            ]
        )
    return bool(algo == "FP8")


def _check_known_bad(architecture: str) -> None:
    """Refuse an FP8 cache where the known-bad table does so whatever the card and the runtime.

    Raises:
        RecipeError: With the table's message.
    """
    faults = [
        Fault("kv_cache_dtype", f"{row.message} ({row.source})")
        for row in known_bad_table()
        if row.severity == "error"
        and _conditions(row.when) == {"architecture", "kv_cache_dtype"}
        and architecture in (row.when.architecture or ())
        and "fp8" in (row.when.kv_cache_dtype or ())
    ]
    if faults:
        raise RecipeError(faults)


def _conditions(when: When) -> set[str]:
    """Names of the conditions that a row has."""
    return {field.name for field in fields(when) if getattr(when, field.name) is not None}


def build_sizes(
    checkpoint_dir: Path,
    *,
    max_batch_size: int,
    max_seq_len: int | None,
    max_num_tokens: int | None,
) -> BuildSizes:
    """Sizes of an engine for this checkpoint, before anything is converted.

    Args:
        checkpoint_dir: Unified FP8 checkpoint.
        max_batch_size: Requests at once.
        max_seq_len: Prompt + output tokens of one request; None for the model's context, its window
            or 4096, whichever is least.
        max_num_tokens: Tokens scheduled in one iteration; None for 8192. More than
            `max_batch_size * max_seq_len` could never be scheduled, and is lowered to that.

    Raises:
        NotFoundError: There is no checkpoint.
        RecipeError: The sizes contradict each other or the model, or the model is not understood.
    """
    spec = _open(checkpoint_dir).spec
    context = spec.max_position_embeddings
    length = max_seq_len or min(context, spec.window or context, _SEQ_LEN)
    tokens = min(max_num_tokens or _NUM_TOKENS, max_batch_size * length)
    faults = []
    if tokens < max_batch_size:
        faults.append(
            Fault(
                "max_num_tokens",
                f"({tokens}) must be >= max_batch_size ({max_batch_size}); increase it",
            )
        )
    if length > context:
        faults.append(
            Fault("max_seq_len", f"({length}) is beyond the model's context ({context}); lower it")
        )
    if faults:
        raise RecipeError(faults)
    return BuildSizes(
        max_batch_size=max_batch_size,
        max_seq_len=length,
        max_num_tokens=tokens,
        opt_num_tokens=None,
    )


def build_line(checkpoint_dir: Path, kv_cache_dtype: str, sizes: BuildSizes) -> str:
    """The `trtllm-build` command for an exported checkpoint, quoted for a shell.

    Kernel choices are those of `conf/compiler/trtllm.yaml`; engine and timing cache go beside the
    checkpoint.
    """
    engine = f"{checkpoint_dir}-engine"
    paths = BuildPaths(
        checkpoint_dir=str(checkpoint_dir),
        engine_dir=engine,
        timing_cache_in=None,
        timing_cache_out=f"{engine}.{TIMING_CACHE_FILE}",
    )
    return shlex.join(build_command(sizes, _plugins(), kv_cache_dtype, paths))


def _open(checkpoint_dir: Path) -> UnifiedCheckpoint:
    """The checkpoint.

    Raises:
        NotFoundError: There is none.
    """
    if not (checkpoint_dir / "config.json").is_file():
        raise NotFoundError(
            f"{checkpoint_dir} holds no config.json; name the folder of a unified FP8 checkpoint"
        )
    return UnifiedCheckpoint(checkpoint_dir)


def _plugins() -> Plugins:
    """Kernel choices of the compiler group's default."""
    return Plugins(**shipped("compiler/trtllm")["plugins"])
