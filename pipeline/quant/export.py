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

_CACHE = (".k_scale", ".v_scale")
_SCALES = (".weight_scale", ".input_scale", *_CACHE)
_FLOAT32_BYTES = 4
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def companion_files(folder: Path) -> list[Path]:
    """Tokenizer, generation config, chat template, licence and notice files of a model folder."""
    named = [folder / name for name in _COMPANIONS]
    legal = [
        path
        for pattern in ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
        for path in sorted(folder.glob(pattern))
    ]
    return [path for path in [*named, *legal] if path.is_file()]


def copy_companions(source: Path, target: Path) -> None:
    """Copy a model folder's companion files."""
    for path in companion_files(source):
        shutil.copyfile(path, target / path.name)


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
    quant_config = json.loads((exported / "hf_quant_config.json").read_text())
    quant_config["quantization"]["quant_algo"] = precision.quant_algo
    quant_config["quantization"]["kv_cache_quant_algo"] = None
    quant_config["quantization"]["exclude_modules"] = ignored
    _write_json(out_dir / "hf_quant_config.json", quant_config)
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
    """Move or copy a shard, its tensors as bfloat16 except quantized weights and scales.

    Where only scales change, as after calibrating in bfloat16, they are patched into the file that
    ModelOpt wrote: four bytes each, where rewriting Phi-3 costs seconds.
    """
    tensors = read_header(shard)
    for name in tensors:
        if name.endswith(_CACHE) and name not in cache_scales:
            raise CorruptError(f"ModelOpt exported {name}, which calibration did not see")
    if not all(
        entry.dtype == ("float32" if name.endswith(_SCALES) else "bfloat16")
        or entry.dtype == quantized_dtype
        for name, entry in tensors.items()
    ):
        _rewrite(shard, target, quantized_dtype, cache_scales)
        return
    scales = {name: entry for name, entry in tensors.items() if name.endswith(_SCALES)}
    with shard.open("r+b") as stream:
        for name, entry in scales.items():
            stream.seek(entry.offset)
            value = struct.unpack("<f", stream.read(_FLOAT32_BYTES))[0]
            stream.seek(entry.offset)
            stream.write(struct.pack("<f", _scale(name, value, cache_scales)))
    shard.replace(target)


def _rewrite(
    shard: Path, target: Path, quantized_dtype: str, cache_scales: Mapping[str, float]
) -> None:
    """Write a shard anew."""
    import torch
    from safetensors.torch import load_file, save_file

    def converted(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith(_SCALES):
            return torch.tensor(_scale(name, float(tensor), cache_scales), dtype=torch.float32)
        if tensor.dtype == getattr(torch, quantized_dtype):
            return tensor
        return tensor.to(torch.bfloat16)

    tensors = {name: converted(name, tensor) for name, tensor in load_file(shard).items()}
    save_file(tensors, target, metadata={"format": "pt"})


def _scale(name: str, value: float, cache_scales: Mapping[str, float]) -> float:
    """The value that a scale must have.

    Scales of linears are bfloat16 values stored as float32 (pipeline.quant.sharing); a GPU's
    division by 448 misses them by a last bit, which rounding restores.
    """
    import torch

    if name.endswith(_CACHE):
        return cache_scales[name]
    return float(torch.tensor(value, dtype=torch.float32).to(torch.bfloat16))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
