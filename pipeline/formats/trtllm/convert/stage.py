"""The TensorRT-LLM convert stage: one folder with config, weights and a record of what was done."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from pipeline.core.cache import StageCache, StageResult
from pipeline.core.settings import STRICT
from pipeline.core.stages import Stage
from pipeline.formats.trtllm.convert.config import Dtype, trtllm_config
from pipeline.formats.trtllm.convert.tensors import TensorPlan, plan_tensors
from pipeline.formats.trtllm.convert.write import write_tensors
from pipeline.quant.unified import UnifiedCheckpoint

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
RECORD_FILE = "conversion.json"

KvCacheDtype = Literal["fp8", "bfloat16", "float16"]
"""A 16-bit cache has the type of the activations."""

STAGE = Stage(
    name="convert-trtllm",
    version=1,
    code=(
        "pipeline.formats.trtllm.convert",
        "pipeline.model",
        "pipeline.core.safetensors_files",
        "pipeline.quant.unified",
    ),
)
"""What shapes the bytes; not the graph builder beside it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrtLlmSettings:
    """What the TensorRT-LLM checkpoint depends on beside the unified one.

    Attributes:
        kv_cache_dtype: `fp8`, which needs the calibrated scales of the cache, or `dtype`.
        dtype: Type of activations and of tensors that are not FP8.
    """

    kv_cache_dtype: KvCacheDtype
    dtype: Dtype

    def __post_init__(self) -> None:
        if self.kv_cache_dtype not in {"fp8", self.dtype}:
            raise ValueError(
                f"kv_cache_dtype ({self.kv_cache_dtype}) must be fp8 or dtype ({self.dtype}): a "
                "16-bit cache has the type of the activations"
            )

    def inputs(self) -> dict[str, Any]:
        """Everything but the checkpoint that shapes the bytes."""
        return {**STAGE.identity, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionRecord:
    """What the conversion did; `to_json` is `conversion.json`, schema 1.

    Attributes:
        architecture: TensorRT-LLM's model class.
        dtype: Type of activations and of tensors that are not FP8.
        kv_cache_dtype: `fp8`, or the 16-bit type.
        max_position_embeddings: Longest context of the model, tokens.
        quantized_linears: How many of TensorRT-LLM's linears are FP8.
        kept_16bit: Names of those that are not (`exclude_modules`).
        requantized: Source module -> relative error that rounding to the scale of its group added:
            root of the summed squared changes over that of the squared values.
        merged_inputs: Linears whose parts had different activation scales; they got the largest.
        attention_window: `max_attention_window` that the runtime must be told; None for no window.
        notes: What a reader must know before building or serving.
    """

    architecture: str
    dtype: Dtype
    kv_cache_dtype: str
    max_position_embeddings: int
    quantized_linears: int
    kept_16bit: tuple[str, ...]
    requantized: dict[str, float]
    merged_inputs: tuple[str, ...]
    attention_window: int | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, **dataclasses.asdict(self)}


def convert_trtllm(
    checkpoint_dir: Path, checkpoint_digest: str, settings: TrtLlmSettings, cache: StageCache
) -> StageResult:
    """Convert a unified FP8 checkpoint, or take the conversion from the cache.

    Returns:
        A folder with `config.json`, `rank0.safetensors` and `conversion.json`.

    Raises:
        RecipeError: TensorRT-LLM cannot express this model or this checkpoint.
        CorruptError: The checkpoint is damaged.
    """
    inputs = {"checkpoint": checkpoint_digest, **settings.inputs()}

    def produce(out_dir: Path) -> None:
        write_checkpoint(checkpoint_dir, settings, out_dir)

    return cache.run(STAGE, inputs, produce)


def write_checkpoint(
    checkpoint_dir: Path, settings: TrtLlmSettings, out_dir: Path
) -> ConversionRecord:
    """Write config, weights and record into the (existing) folder `out_dir`."""
    checkpoint = UnifiedCheckpoint(checkpoint_dir)
    spec, kv_fp8 = checkpoint.spec, settings.kv_cache_dtype == "fp8"
    plan = plan_tensors(checkpoint, dtype=settings.dtype, kv_fp8=kv_fp8)
    content = trtllm_config(
        spec,
        dtype=settings.dtype,
        kv_fp8=kv_fp8,
        exclude=plan.excluded,
    )
    errors = write_tensors(checkpoint, plan, out_dir)
    window = spec.window
    if window is not None and window >= spec.max_position_embeddings:
        window = None
    record = ConversionRecord(
        architecture=spec.architecture,
        dtype=settings.dtype,
        kv_cache_dtype=settings.kv_cache_dtype,
        max_position_embeddings=spec.max_position_embeddings,
        quantized_linears=len(plan.fp8),
        kept_16bit=plan.excluded,
        requantized=errors,
        merged_inputs=plan.merged_inputs,
        attention_window=window,
        notes=tuple(_notes(plan, errors, window, kv_fp8=kv_fp8)),
    )
    for note in record.notes:
        log.info("%s", note)
    _write_json(out_dir / CONFIG_FILE, content)
    _write_json(out_dir / RECORD_FILE, record.to_json())
    return record


def _notes(
    plan: TensorPlan, errors: dict[str, float], window: int | None, *, kv_fp8: bool
) -> list[str]:
    """What a reader must know.

    A window is not written into the checkpoint: TensorRT-LLM's Llama and Phi-3 classes have no key
    for it, and the `runtime_defaults` that could carry it cannot be saved with the engine
    (`ConfigEncoder` in `builder.py`, index number 205252225; TensorRT-LLM issue 2912).
    """
    notes = []
    if errors:
        worst = max(errors, key=errors.__getitem__)
        mean = sum(errors.values()) / len(errors)
        notes.append(
            f"{len(errors)} linears were rounded a second time, to the scale of those they are "
            f"fused with; this adds a relative weight error of {mean:.4f} on average, "
            f"{errors[worst]:.4f} at worst ({worst}). Checkpoints of enginesmith share scales and "
            "lose nothing here"
        )
    if plan.merged_inputs:
        notes.append(
            f"{len(plan.merged_inputs)} linears had parts with different activation scales and got "
            f"the largest, such as {plan.merged_inputs[0]}"
        )
    if window is not None:
        notes.append(
            f"the model attends to the last {window} tokens only, which the engine does not know: "
            f"with max_seq_len above {window}, the runtime must be told "
            f"kv_cache_config.max_attention_window=[{window}]"
        )
    dense = [name for name in plan.excluded if name.endswith(".attention.dense")]
    if kv_fp8 and dense:
        notes.append(
            f"{dense[0]} is 16-bit while the KV cache is FP8; FP8 context attention then has no "
            "scale for its output, which was not tried with TensorRT-LLM 1.2.1"
        )
    return notes


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
