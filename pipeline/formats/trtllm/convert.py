"""The TensorRT-LLM convert stage: one folder with config, weights and a record of what was done.

The header of the weights is written first, since every size is known from the plan; then tensor
after tensor goes through a memory map in pieces: at most one source tensor is resident. E4M3 codes
move to a larger scale by a table, and what that costs follows from how often each code occurs.
"""

from __future__ import annotations

import json
import logging
import shlex
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline.core.cache import Stage, StageCache, StageResult, atomic_folder
from pipeline.core.errors import ConflictError, CorruptError, Fault, NotFoundError, RecipeError
from pipeline.core.ownership import require_unshared
from pipeline.core.progress import progress
from pipeline.core.safetensors_files import TensorSpec, read_header, safetensors_header
from pipeline.core.settings import shipped
from pipeline.core.values import Limits
from pipeline.formats.trtllm.build_tool import TIMING_CACHE_FILE, Plugins, build_command
from pipeline.formats.trtllm.layout import (
    QK_NORM_EPS,
    Dtype,
    Piece,
    PlannedTensor,
    TensorPlan,
    plan_tensors,
    trtllm_config,
)
from pipeline.quant.spec import SHAPING_CODE
from pipeline.quant.unified import (
    UnifiedCheckpoint,
    all_finite,
    copy_companions,
    declared_quantization,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

WEIGHTS_FILE = "rank0.safetensors"
MAX_ADDED_ERROR = 0.1
"""Largest relative error of a tensor that rounding to the scale of its group may add. Rounding
E4M3 once more costs 0.02 to 0.04 (q, k, v, gate and up of SmolLM2, 2026-11-24); ten percent means
that most values fell below the smallest code, and 1.0 that all of them became 0."""
_CHUNK_BYTES = 1 << 20
"""Counting codes takes eight times as much: NumPy counts in 64-bit integers."""

STAGE = Stage(
    name="convert-trtllm",
    version=1,
    code=(
        "pipeline.formats.trtllm.convert",
        "pipeline.formats.trtllm.layout",
        *SHAPING_CODE,
    ),
)


def convert_trtllm(
    checkpoint_dir: Path, checkpoint_digest: str, cache: StageCache, *, dtype: Dtype, kv_fp8: bool
) -> StageResult:
    """Convert a unified FP8 checkpoint, or take the conversion from the cache.

    Activations and what is not FP8 become `dtype`, and the KV cache, but with `kv_fp8` its
    calibrated scales are used.

    Raises:
        RecipeError: TensorRT-LLM cannot express this model or this checkpoint.
        CorruptError: The checkpoint is damaged.
    """

    def produce(out_dir: Path) -> None:
        write_checkpoint(checkpoint_dir, out_dir, dtype=dtype, kv_fp8=kv_fp8)

    types = conversion_inputs(dtype=dtype, kv_fp8=kv_fp8)
    return cache.run(STAGE, {"checkpoint": checkpoint_digest, **types}, produce)


def conversion_inputs(*, dtype: Dtype, kv_fp8: bool) -> dict[str, Any]:
    """Everything but the checkpoint that shapes the bytes."""
    return {**STAGE.identity, "kv_cache_dtype": "fp8" if kv_fp8 else dtype, "dtype": dtype}


def write_checkpoint(
    checkpoint_dir: Path, out_dir: Path, *, dtype: Dtype, kv_fp8: bool
) -> dict[str, Any]:
    """Write config, weights and record into the folder `out_dir`; see `convert_trtllm`.

    Returns what `conversion.json` says: among others `requantized` (source module -> relative error
    that rounding to the scale of its group added), `merged_inputs` (linears that got the largest of
    different activation scales), `attention_window` (an argument of the runtime; null for none).
    """
    checkpoint = UnifiedCheckpoint(checkpoint_dir)
    spec = checkpoint.spec
    plan = plan_tensors(checkpoint, dtype=dtype, kv_fp8=kv_fp8)
    config = trtllm_config(spec, dtype=dtype, kv_fp8=kv_fp8, exclude=plan.excluded)
    errors = _write_tensors(plan, out_dir / WEIGHTS_FILE)
    window = spec.window
    if window is not None and window >= spec.max_position_embeddings:
        window = None
    notes = list(_notes(plan, errors, window, kv_fp8=kv_fp8))
    record = {
        "schema": 1,
        "architecture": spec.architecture,
        "dtype": dtype,
        "kv_cache_dtype": "fp8" if kv_fp8 else dtype,
        "max_position_embeddings": spec.max_position_embeddings,
        "quantized_linears": len(plan.fp8),
        "kept_16bit": plan.excluded,
        "requantized": errors,
        "merged_inputs": plan.merged_inputs,
        "attention_window": window,
        "notes": notes,
    }
    for note in notes:
        log.info("%s", note)
    for name, content in {"config.json": config, "conversion.json": record}.items():
        (out_dir / name).write_text(json.dumps(content, indent=2) + "\n")
    return record


def _notes(
    plan: TensorPlan, errors: dict[str, float], window: int | None, *, kv_fp8: bool
) -> Iterator[str]:
    """What a reader must know.

    A window is not written into the checkpoint: TensorRT-LLM's Llama and Phi-3 classes have no key
    for it, and the `runtime_defaults` that could carry it cannot be saved with the engine
    (`ConfigEncoder` in `builder.py`, index number 205252225; TensorRT-LLM issue 2912).
    """
    if errors:
        worst = max(errors, key=errors.__getitem__)
        mean = sum(errors.values()) / len(errors)
        yield (
            f"{len(errors)} linears were rounded a second time, to the scale of those they are "
            f"fused with; this adds a relative weight error of {mean:.4f} on average, "
            f"{errors[worst]:.4f} at worst ({worst}). Checkpoints of enginesmith share scales and "
            "lose nothing here"
        )
    if plan.merged_inputs:
        yield (
            f"{len(plan.merged_inputs)} linears had parts with different activation scales and got "
            f"the largest, such as {plan.merged_inputs[0]}"
        )
    spec = plan.checkpoint.spec
    if spec.layers[0].attention.qk_norm and spec.norm_eps != QK_NORM_EPS:
        yield (
            f"TensorRT-LLM's norms of q and k add {QK_NORM_EPS:g} to the mean square, the model "
            f"{spec.norm_eps:g}: with a mean square of 1 they differ by "
            f"{abs(QK_NORM_EPS - spec.norm_eps) / 2:.1g} of their value"
        )
    if window is not None:
        yield (
            f"the model attends to the last {window} tokens only, which the engine does not know: "
            f"with max_seq_len above {window}, the runtime must be told "
            f"kv_cache_config.max_attention_window=[{window}]"
        )
    dense = [name for name in plan.excluded if name.endswith(".attention.dense")]
    if kv_fp8 and dense:
        yield (
            f"{dense[0]} is 16-bit while the KV cache is FP8; FP8 context attention then has no "
            "scale for its output, which was not tried with TensorRT-LLM 1.2.1"
        )


def _write_tensors(plan: TensorPlan, path: Path) -> dict[str, float]:
    """Write the weights, and check the file; returns the error of each module rounded again."""
    errors: dict[str, float] = {}
    specs = [TensorSpec(one.name, one.dtype, one.shape) for one in plan.tensors]
    with path.open("wb") as stream, progress("Converting", len(specs), "tensors") as done:
        stream.write(safetensors_header(specs))
        for tensor in plan.tensors:
            errors |= _write_tensor(plan.checkpoint, tensor, stream)
            done(1)
    read_header(path)  # holds the file against its length
    return errors


def _write_tensor(
    checkpoint: UnifiedCheckpoint, tensor: PlannedTensor, stream: BinaryIO
) -> dict[str, float]:
    """Append one tensor; returns the error of each module in it that was rounded again."""
    if tensor.value is not None:
        stream.write(struct.pack("<f", tensor.value))
    errors: dict[str, float] = {}
    for piece in tensor.pieces:
        if piece.old_scale != piece.new_scale:
            module = piece.tensor.removesuffix(".weight")
            errors[module] = _write_requantized(checkpoint, piece, stream)
        else:
            for rows in _row_blocks(checkpoint, piece):
                stream.write(_cast(rows, tensor).tobytes())
    return errors


def _row_blocks(checkpoint: UnifiedCheckpoint, piece: Piece) -> Iterator[NDArray[Any]]:
    """The piece in blocks of some megabytes."""
    array = checkpoint.read(piece.tensor)
    start, stop = piece.rows or (0, array.shape[0])
    step = max(1, _CHUNK_BYTES // max(1, array[:1].nbytes))
    for first in range(start, stop, step):
        rows = array[first : min(first + step, stop)]
        if not all_finite(rows):
            raise CorruptError(
                f"{checkpoint.entry(piece.tensor).file}: tensor {piece.tensor} holds NaN or "
                "infinite values; make the checkpoint again"
            )
        yield rows


def _cast(rows: NDArray[Any], tensor: PlannedTensor) -> NDArray[Any]:
    """The rows in the tensor's dtype; a fault where a finite value became infinite (float16)."""
    import numpy as np

    wanted = np.dtype(tensor.dtype)
    if rows.dtype == wanted:
        return rows
    with np.errstate(over="ignore"):
        cast: NDArray[Any] = rows.astype(np.float32).astype(wanted)
    if (np.isinf(cast) & np.isfinite(rows)).any():
        raise RecipeError(
            [Fault(tensor.name, f"has values beyond the range of {tensor.dtype}; use bfloat16")]
        )
    return cast


def _write_requantized(checkpoint: UnifiedCheckpoint, piece: Piece, stream: BinaryIO) -> float:
    """Append codes moved to the new scale; returns the relative error (RMS) of that.

    A code becomes the one nearest to `value * old_scale / new_scale`, in float32 and in this order
    of operations, as `FP8Linear.postprocess` of TensorRT-LLM does it (`quantization/layers.py`,
    index number 790827869). NaN stays NaN; nothing overflows, as the new scale is the larger one.
    """
    import ml_dtypes
    import numpy as np

    e4m3 = ml_dtypes.float8_e4m3fn
    values = np.arange(256, dtype=np.uint8).view(e4m3).astype(np.float32)
    moved = values * np.float32(piece.old_scale) / np.float32(piece.new_scale)
    table = moved.astype(e4m3).view(np.uint8)  # [256]: old code -> new code
    counts = np.zeros(256, np.int64)
    for rows in _row_blocks(checkpoint, piece):
        codes = rows.view(np.uint8)
        counts += np.bincount(codes.ravel(), minlength=256)
        stream.write(table[codes].tobytes())
    exact = values.astype(np.float64)
    seen = (counts > 0) & np.isfinite(exact)
    old, new = exact[seen] * piece.old_scale, exact[table][seen] * piece.new_scale
    total = float((counts[seen] * old**2).sum())
    changed = float((counts[seen] * (new - old) ** 2).sum())
    error = (changed / total) ** 0.5 if total else 0.0
    if error > MAX_ADDED_ERROR:
        message = (
            f"has scale {piece.old_scale:g}, a linear that it is fused with {piece.new_scale:g}; "
            f"rounding to that adds a relative error of {error:.2f}, at most {MAX_ADDED_ERROR} is "
            "allowed: quantize again with one scale for q, k, v and one for gate, up"
        )
        raise RecipeError([Fault(piece.tensor, message)])
    return error


_SEQ_LEN, _NUM_TOKENS = 4096, 8192  # as in conf/compiler/trtllm.yaml


@dataclass(frozen=True, kw_only=True)
class Export:
    """`enginesmith export-trtllm`: nothing speaks against it; `command` is quoted for a shell.

    The checkpoint may be of any origin: ours, or what ModelOpt's `export_hf_checkpoint` writes by
    itself, with scales that differ inside a fused group, and with or without scales of the cache.
    """

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
        with atomic_folder(self.out_dir, "OUT_DIR") as private:
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
    place = _new_folder(out_dir)
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


def _new_folder(out_dir: Path) -> Path:
    """The folder without links, which does not exist yet."""
    require_unshared(out_dir, "OUT_DIR")
    place = out_dir.resolve()
    below = next(parent for parent in place.parents if parent.exists())
    if not below.is_dir():
        raise RecipeError([Fault("OUT_DIR", f"{out_dir} is below {below}, which is a file")])
    if place.exists():
        free = (place if place.is_dir() else place.parent) / "checkpoint"
        raise ConflictError(f"{out_dir} exists; name a new folder, such as {free}")
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
