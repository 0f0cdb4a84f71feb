"""What a checkpoint says about its own quantization, in the files of any exporter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import CorruptError
from pipeline.core.json_files import read_json_object

DECLARATION = "hf_quant_config.json"
"""ModelOpt's own file; `config.json` says the same under `quantization_config`."""

_PER_TENSOR_FORMATS = {None, "float-quantized", "naive-quantized"}
"""Formats of compressed-tensors that may be FP8 with one scale for a tensor."""


@dataclass(frozen=True, kw_only=True)
class DeclaredQuantization:
    """What was read.

    Attributes:
        file: Where it is declared; `config.json` if nowhere.
        algorithm: Of the weights: ModelOpt's `quant_algo`, such as `FP8` or `NVFP4`, or the name of
            another exporter's format; None if nothing is declared, or what may be per-tensor FP8.
        kv_cache: Of the KV cache, such as `FP8`; None for 16 bits.
    """

    file: str
    algorithm: str | None
    kv_cache: str | None


def declared_quantization(folder: Path) -> DeclaredQuantization:
    """Read the declaration of a checkpoint.

    Raises:
        CorruptError: A file is not JSON, or a value has another type than the format demands.
    """
    path = folder / DECLARATION
    if path.is_file():
        declared = _object(path, read_json_object(path), "quantization")
        return DeclaredQuantization(
            file=DECLARATION,
            algorithm=_word(path, declared, "quant_algo"),
            kv_cache=_word(path, declared, "kv_cache_quant_algo"),
        )
    path = folder / "config.json"
    declared = _object(path, read_json_object(path), "quantization_config")
    scheme = declared.get("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        float8 = scheme.get("type") == "float" and scheme.get("num_bits") == 8
        scheme = "FP8" if float8 else f"{dict(scheme)}"
    elif scheme is not None and not isinstance(scheme, str):
        raise CorruptError(f"{path}: kv_cache_scheme is {scheme!r:.80}, wanted an object or a name")
    return DeclaredQuantization(
        file=path.name, algorithm=_config_algorithm(path, declared), kv_cache=scheme
    )


def _config_algorithm(path: Path, declared: Mapping[str, Any]) -> str | None:
    """The algorithm of a `quantization_config`, ModelOpt's or another exporter's."""
    if algorithm := _word(path, declared, "quant_algo"):
        return algorithm
    method, layout = _word(path, declared, "quant_method"), _word(path, declared, "format")
    if block := declared.get("weight_block_size"):
        return f"{method} in blocks of {block}"
    if method in {None, "modelopt", "fp8", "compressed-tensors"} and layout in _PER_TENSOR_FORMATS:
        return None
    return f"{method} ({layout})" if layout else method


def _object(path: Path, parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = parent.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise CorruptError(f"{path}: {key} is {value!r:.80}, wanted an object; make it again")
    if value is None and path.name == DECLARATION:
        raise CorruptError(f"{path}: {key} is missing; make the checkpoint again")
    return value or {}


def _word(path: Path, parent: Mapping[str, Any], key: str) -> str | None:
    value = parent.get(key)
    if value is not None and not isinstance(value, str):
        raise CorruptError(f"{path}: {key} is {value!r:.80}, wanted a name; make it again")
    return value
