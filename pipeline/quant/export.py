"""Makes ModelOpt's export the hub checkpoint: bfloat16, the source's own config, all companions.

ModelOpt writes the unified FP8 checkpoint; three things of it are changed. Tensors that are no
FP8 weight and no scale become bfloat16 (it keeps a float32 model's as float32). `config.json` is
the source's own with the quantization added, since the exporter rewrites it in the installed
Transformers' spelling, which other runtimes may not read. And the KV cache is declared 16-bit: the
FP8 scales are in the checkpoint, but whether a runtime uses them is the compiler group's choice.
Those scales are written from the calibrated amax: ModelOpt 0.37 would raise each to at least 1.0,
0.47 does not, and one model must give the same checkpoint under both.
Linears that stay 16-bit are listed by their exact names, where ModelOpt writes wildcards that
runtimes read in ways of their own.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import CorruptError
from pipeline.core.safetensors_files import read_header
from pipeline.quant.spec import QuantSpec
from pipeline.quant.unified import DECLARATION, copy_companions

_CACHE = (".k_scale", ".v_scale")
_SCALES = (".weight_scale", ".input_scale", *_CACHE)
_FLOAT32_BYTES = 4


def normalize_export(
    exported: Path,
    weights_dir: Path,
    out_dir: Path,
    *,
    precision: QuantSpec,
    kept_16bit: Sequence[str],
    cache_scales: Mapping[str, float],
) -> None:
    """Write the hub checkpoint into `out_dir` from ModelOpt's export.

    Args:
        exported: What ModelOpt wrote.
        weights_dir: The source model's folder.
        out_dir: Gets the checkpoint.
        precision: Of the other linears.
        kept_16bit: Linears of the layers that stay bfloat16.
        cache_scales: Value of every `k_scale` and `v_scale` tensor.

    Raises:
        CorruptError: The export lacks its quantization config or its weights, or has a cache scale
            that was not calibrated.
    """
    shards = sorted(exported.glob("*.safetensors"))
    config = json.loads((exported / "config.json").read_text())
    if not shards or "quantization_config" not in config:
        raise CorruptError("ModelOpt exported no quantized weights; see the log of this run")
    for shard in shards:
        _normalize_shard(shard, out_dir / shard.name, precision.weight_dtype, cache_scales)
    for index in exported.glob("*.safetensors.index.json"):
        shutil.copyfile(index, out_dir / index.name)
    ignored = ["lm_head", "model.embed_tokens", *kept_16bit]
    config["quantization_config"] |= {"ignore": ignored, "quant_algo": precision.quant_algo}
    _write_config(config["quantization_config"], weights_dir, out_dir)
    quant_config = json.loads((exported / DECLARATION).read_text())
    quant_config["quantization"] |= {
        "quant_algo": precision.quant_algo,
        "kv_cache_quant_algo": None,
        "exclude_modules": ignored,
    }
    _write_json(out_dir / DECLARATION, quant_config)
    copy_companions(weights_dir, out_dir)


def _write_config(quantization: dict[str, Any], weights_dir: Path, out_dir: Path) -> None:
    config = json.loads((weights_dir / "config.json").read_text())
    config["dtype" if "dtype" in config else "torch_dtype"] = "bfloat16"
    config["quantization_config"] = {
        key: value for key, value in quantization.items() if key != "kv_cache_scheme"
    }
    _write_json(out_dir / "config.json", config)


def _normalize_shard(
    shard: Path, target: Path, quantized_dtype: str, cache_scales: Mapping[str, float]
) -> None:
    """Move a shard, its tensors as bfloat16 except quantized weights and scales.

    Scales are patched into the file: after calibrating in bfloat16 nothing else changes, and
    rewriting Phi-3 costs seconds.
    """
    dtypes = ("bfloat16", quantized_dtype)
    if not all(
        entry.dtype == "float32" if name.endswith(_SCALES) else entry.dtype in dtypes
        for name, entry in read_header(shard).items()
    ):
        _round_to_bfloat16(shard, quantized_dtype)
    with shard.open("r+b") as stream:
        for name, entry in read_header(shard).items():
            if name.endswith(_SCALES):
                stream.seek(entry.offset)
                value = struct.unpack("<f", stream.read(_FLOAT32_BYTES))[0]
                stream.seek(entry.offset)
                stream.write(struct.pack("<f", _scale(name, value, cache_scales)))
    shard.replace(target)


def _round_to_bfloat16(shard: Path, quantized_dtype: str) -> None:
    """Write a shard anew."""
    import torch
    from safetensors.torch import load_file, save_file

    def converted(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith(_SCALES):
            return tensor.float()
        if tensor.dtype == getattr(torch, quantized_dtype):
            return tensor
        return tensor.to(torch.bfloat16)

    tensors = {name: converted(name, tensor) for name, tensor in load_file(shard).items()}
    save_file(tensors, shard, metadata={"format": "pt"})


def _scale(name: str, value: float, cache_scales: Mapping[str, float]) -> float:
    """The value that a scale must have.

    Scales of linears are bfloat16 values stored as float32 (pipeline.quant.sharing); a GPU's
    division by 448 misses them by a last bit, which rounding restores.
    """
    import torch

    if not name.endswith(_CACHE):
        return float(torch.tensor(value, dtype=torch.float32).to(torch.bfloat16))
    if name not in cache_scales:
        raise CorruptError(f"ModelOpt exported {name}, which calibration did not see")
    return cache_scales[name]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
