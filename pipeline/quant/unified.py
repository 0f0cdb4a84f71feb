"""Reads a Hugging Face folder without a model class: config, and tensors as NumPy views.

Works on a unified checkpoint (`X.weight`, or where its precision stores it, in the precision's
type, with scales such as `X.weight_scale` beside it) and on plain weights alike. Tensors are memory
maps: converting streams a checkpoint larger than memory, and bfloat16 and float8 arrive bit for bit
(`ml_dtypes`).
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import CorruptError, Fault, RecipeError
from pipeline.core.safetensors_files import TensorEntry, folder_tensors
from pipeline.core.settings import read_json_object
from pipeline.model.read import load_config, read_spec
from pipeline.model.spec import EMBEDDING, LM_HEAD, ModelSpec
from pipeline.quant.bf16 import SPEC as SIXTEEN_BIT
from pipeline.quant.spec import QuantSpec, quant_specs

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

DECLARATION = "hf_quant_config.json"
"""ModelOpt's own file; `config.json` says the same under `quantization_config`."""

_PER_TENSOR_FORMATS = {None, "float-quantized", "naive-quantized"}
"""Formats of compressed-tensors that may be FP8 with one scale for a tensor."""
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
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
_PLAIN_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class UnifiedCheckpoint:
    """An opened folder; nothing is read before it is asked for."""

    dir: Path

    @cached_property
    def config_json(self) -> Mapping[str, Any]:
        return load_config(self.dir)

    @cached_property
    def spec(self) -> ModelSpec:
        return read_spec(self.config_json)

    @cached_property
    def precision(self) -> QuantSpec:
        """That of its quantized linears, else 16-bit; RecipeError for one not known here."""
        declared = declared_quantization(self.dir)
        specs = [spec for spec in quant_specs().values() if spec.quant_algo]
        known = {spec.declared or spec.quant_algo: spec for spec in specs}
        if (algorithm := declared.algorithm) in known:
            return known[algorithm]
        if algorithm is not None:
            message = (
                f"declares {algorithm}, which is not converted. Serve the checkpoint as it is "
                "(vLLM, SGLang, TensorRT-LLM >= 1.3), or quantize the 16-bit model: enginesmith new"
            )
            raise RecipeError([Fault(str(self.dir / declared.file), message)])
        dtypes = {entry.dtype for entry in self.tensors.values()}
        return next((spec for spec in known.values() if spec.weight_dtype in dtypes), SIXTEEN_BIT)

    @cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Every tensor by name, in file order, of the shards that `folder_tensors` counts."""
        return folder_tensors(self.dir)

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies; CorruptError if there is no such tensor."""
        if name not in self.tensors:
            raise CorruptError(f"{self.dir}: tensor {name} is missing; make the checkpoint again")
        return self.tensors[name]

    def read(self, name: str) -> NDArray[Any]:
        """A tensor as a read-only memory map; CorruptError if it is missing or empty."""
        import ml_dtypes  # noqa: F401  registers bfloat16 and float8 with NumPy
        import numpy as np

        entry = self.entry(name)
        dtype = np.dtype(entry.dtype)
        count = int(np.prod(entry.shape, dtype=np.int64))
        if count * dtype.itemsize != entry.size_bytes or count == 0:
            raise CorruptError(
                f"{entry.file}: tensor {name} has {entry.size_bytes} bytes, its shape "
                f"{entry.shape} needs {count * dtype.itemsize}; make the checkpoint again"
            )
        raw = np.memmap(entry.file, np.uint8, "r", entry.offset, (entry.size_bytes,))
        return raw.view(dtype).reshape(entry.shape)

    def scalar(self, name: str) -> np.float32:
        """A scale, as float32; CorruptError if it is missing or has more elements than one."""
        import numpy as np

        values = self.read(name).reshape(-1)
        if len(values) != 1:
            raise CorruptError(
                f"{self.dir}: {name} has {len(values)} elements; wanted one scale per tensor"
            )
        return np.float32(values[0])

    def check_tensors(self) -> None:
        """Require every tensor that the config implies, with its shape, and no other.

        One that no converter reads (a bias, a scale of another format) is a silently wrong engine.

        Raises:
            CorruptError: Lists what is missing, left over or wrong.
            RecipeError: Tensors are of dtypes that no converter reads.
        """
        wanted, precision = self.spec.tensors(), self.precision
        linears = {f"{module}.{precision.weight_name}" for module in self.spec.modules}
        if precision.weight_name != "weight":  # a linear of 16 bits keeps its name
            for module in self.quantized_linears:
                shape = precision.stored_shape(wanted.pop(f"{module}.weight"))
                wanted[f"{module}.{precision.weight_name}"] = shape
        faults = [f"tensor {name} is missing" for name in wanted if name not in self.tensors]
        others = []
        for name, entry in self.tensors.items():
            if name not in wanted:
                if not self._is_companion(name):
                    faults.append(f"tensor {name} is not known to the converters")
                continue
            known = {*_PLAIN_DTYPES, *([precision.weight_dtype] if name in linears else [])}
            if entry.dtype not in known:
                message = f"has dtype {entry.dtype}; {' or '.join(sorted(known))} is converted"
                others.append(Fault(name, message))
            elif entry.shape != wanted[name]:
                faults.append(
                    f"tensor {name} has the shape {entry.shape}, config.json implies {wanted[name]}"
                )
        if others:
            raise RecipeError(others[:8])
        if not faults and not self._head_is_embedding():
            faults.append(
                f"{LM_HEAD}.weight differs from {EMBEDDING}.weight, although config.json ties them "
                "(tie_word_embeddings)"
            )
        if faults:
            raise CorruptError(
                f"{self.dir} does not hold the model of its config.json; make the checkpoint "
                f"again:{list_faults(faults)}"
            )

    def _is_companion(self, name: str) -> bool:
        """Scales; rotary frequencies, which follow from the config; an lm_head that is tied."""
        module, _, kind = name.rpartition(".")
        if kind in self.precision.scales:
            return self.is_quantized(module)
        if kind in ("k_scale", "v_scale"):
            return ".self_attn" in module
        return name.endswith(".rotary_emb.inv_freq") or (
            name == f"{LM_HEAD}.weight" and self.spec.tied
        )

    def _head_is_embedding(self) -> bool:
        """Whether a tied lm_head, where it is stored, is the embedding."""
        if not self.spec.tied or f"{LM_HEAD}.weight" not in self.tensors:
            return True
        head, table = (self.read(f"{module}.weight") for module in (LM_HEAD, EMBEDDING))
        return head.dtype == table.dtype and head.tobytes() == table.tobytes()

    def is_quantized(self, module: str) -> bool:
        return module in self.quantized_linears

    @cached_property
    def quantized_linears(self) -> tuple[str, ...]:
        if self.precision is SIXTEEN_BIT:
            return ()
        end = f".{self.precision.weight_name}"
        return tuple(
            name.removesuffix(end)
            for name, entry in self.tensors.items()
            if name.endswith(end) and entry.dtype == self.precision.weight_dtype
        )

    @cached_property
    def parameters(self) -> Mapping[str, str]:
        """Transformers' name of each tensor of the model -> its name here; not its scales."""
        scales = {"k_scale", "v_scale", *self.precision.scales}
        end = self.precision.weight_name
        stored = {f"{module}.{end}": f"{module}.weight" for module in self.quantized_linears}
        names = (name for name in self.tensors if name.rpartition(".")[2] not in scales)
        return {stored.get(name, name): name for name in names}

    def weight_scale(self, module: str) -> torch.Tensor:
        """Of a quantized linear: one number, or [rows, groups of columns]."""
        import torch

        name = f"{module}.weight_scale"
        if self.precision.group_sizes:
            return torch_view(self.read(name))
        return torch.tensor(self.scalar(name))


def list_faults(faults: Sequence[str]) -> str:
    """The first eight, one a line, and how many more there are."""
    more = [f"and {len(faults) - 8} more"] if len(faults) > 8 else []
    return "".join(f"\n    {fault}" for fault in [*faults[:8], *more])


def all_finite(values: NDArray[Any]) -> bool:
    """Whether no value is NaN or infinite, by the bits of the exponents; E4M3 has a NaN only."""
    import numpy as np

    name = values.dtype.name
    if name not in _EXPONENT_BITS:
        return True
    bits = values.view(np.dtype(f"u{values.dtype.itemsize}"))
    exponent = bits.dtype.type(_EXPONENT_BITS[name])
    return not bool(((bits & exponent) == exponent).any())


_EXPONENT_BITS = {
    "float32": 0x7F800000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float8_e4m3fn": 0x7F,
}
"""dtype -> bits that are all set in NaN and infinity, and in nothing else."""


def torch_view(values: NDArray[Any]) -> torch.Tensor:
    """A memory map as a tensor of the same memory: NumPy has no fast arithmetic on these types."""
    import numpy as np
    import torch

    dtype = getattr(torch, values.dtype.name)
    raw = values.view(np.dtype(f"u{values.dtype.itemsize}"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(raw).view(dtype)


@dataclass(frozen=True, kw_only=True)
class DeclaredQuantization:
    """What a checkpoint says about its own quantization, and in which file.

    `algorithm` is of the weights: ModelOpt's `quant_algo`, such as `FP8`, or the name of another
    exporter's format; None if nothing is declared, or what may be per-tensor FP8. `kv_cache` is
    such as `FP8`; None for 16 bits.
    """

    file: str
    algorithm: str | None
    kv_cache: str | None


def declared_quantization(folder: Path) -> DeclaredQuantization:
    """Read the declaration, in the files of any exporter; CorruptError where it is damaged."""
    path = folder / DECLARATION
    if path.is_file():
        declared = _section(path, "quantization")
        return DeclaredQuantization(
            file=DECLARATION,
            algorithm=_word(path, declared, "quant_algo"),
            kv_cache=_word(path, declared, "kv_cache_quant_algo"),
        )
    path = folder / "config.json"
    declared = _section(path, "quantization_config")
    scheme = declared.get("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        float8 = scheme.get("type") == "float" and scheme.get("num_bits") == 8
        scheme = "FP8" if float8 else f"{dict(scheme)}"
    else:
        scheme = _word(path, declared, "kv_cache_scheme")
    return DeclaredQuantization(
        file=path.name, algorithm=_config_algorithm(path, declared), kv_cache=scheme
    )


def declare_cache(folder: Path, quant_algo: str) -> None:
    """Declare the type of the KV cache where the checkpoint declares its own."""
    path = folder / DECLARATION
    if path.is_file():
        content = json.loads(path.read_text())
        content["quantization"]["kv_cache_quant_algo"] = quant_algo
    else:
        path = folder / "config.json"
        content = json.loads(path.read_text())
        content["quantization_config"]["kv_cache_scheme"] = _CACHE_SCHEMES[quant_algo]
    path.write_text(json.dumps(content, indent=2) + "\n")


_CACHE_SCHEMES = {
    "FP8": {
        **{"num_bits": 8, "type": "float", "strategy": "tensor"},
        **{"symmetric": True, "dynamic": False},
    }
}
"""As compressed-tensors writes them."""


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


def _section(path: Path, key: str) -> Mapping[str, Any]:
    value = read_json_object(path).get(key)
    if not isinstance(value, Mapping) and (value is not None or path.name == DECLARATION):
        raise CorruptError(f"{path}: {key} is {value!r:.80}, wanted an object; make it again")
    return value or {}


def _word(path: Path, section: Mapping[str, Any], key: str) -> str | None:
    value = section.get(key)
    if value is not None and not isinstance(value, str):
        raise CorruptError(f"{path}: {key} is {value!r:.80}, wanted a name; make it again")
    return value


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config, chat template, licence and notice files of a model."""
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
