"""Reads a Hugging Face folder without a model class: config, and tensors as NumPy views.

Works on a unified FP8 checkpoint (`X.weight` float8_e4m3fn with `X.weight_scale` and
`X.input_scale`) and on plain weights alike. Tensors are memory maps, so that converting streams a
checkpoint larger than memory, and bfloat16 and float8 arrive bit for bit (through `ml_dtypes`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import CorruptError, Fault, RecipeError
from pipeline.shapes import shape_of_config

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors dtype tag -> NumPy (or ml_dtypes) name."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, byte range in it, dtype name and shape."""

    name: str
    file: Path
    offset: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class DecoderConfig:
    """What the decoder graph needs from `config.json`.

    Attributes:
        architecture: `architectures[0]`.
        hidden_size: Width of the residual stream.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Size of one head.
        vocab_size: Rows of the embedding.
        rms_norm_eps: Added to the mean square.
        rope_theta: Base of the rotary embedding.
        max_position_embeddings: Longest context, tokens.
        tied: lm_head is the embedding.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tied: bool

    @staticmethod
    def from_json(config: Mapping[str, Any]) -> DecoderConfig:
        """Read a config, refusing whatever would change the graph in a way we do not build.

        Raises:
            RecipeError: Another architecture, activation, bias, rope type or a sliding window.
        """
        shape = shape_of_config(config)
        faults = [
            Fault(f"config.json: {key}", f"is {got!r}; the decoder graph supports {wanted!r}")
            for key, got, wanted in (
                ("architectures", shape["architecture"], "LlamaForCausalLM"),
                ("hidden_act", config.get("hidden_act"), "silu"),
                ("attention_bias", shape["attention_bias"], False),
                ("mlp_bias", bool(config.get("mlp_bias", False)), False),
                ("rope_type", shape["rope_type"], "default"),
                ("sliding_window", shape["sliding_window"], None),
                ("partial_rotary_factor", config.get("partial_rotary_factor", 1.0), 1.0),
            )
            if got != wanted
        ]
        if faults:
            raise RecipeError(faults)
        return DecoderConfig(
            architecture=shape["architecture"],
            hidden_size=shape["hidden_size"],
            num_layers=shape["num_hidden_layers"],
            num_heads=shape["num_attention_heads"],
            num_kv_heads=shape["num_key_value_heads"],
            head_dim=shape["head_dim"],
            vocab_size=shape["vocab_size"],
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope_theta=shape["rope_theta"],
            max_position_embeddings=shape["max_position_embeddings"],
            tied=shape["tie_word_embeddings"],
        )


@dataclass(frozen=True)
class UnifiedCheckpoint:
    """An opened folder; nothing is read before it is asked for."""

    dir: Path

    @cached_property
    def config_json(self) -> Mapping[str, Any]:
        """`config.json` as it is."""
        parsed: Mapping[str, Any] = json.loads((self.dir / "config.json").read_text())
        return parsed

    @cached_property
    def config(self) -> DecoderConfig:
        """The part of it that the graph needs."""
        return DecoderConfig.from_json(self.config_json)

    @cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Every tensor of every shard, by name, in file order."""
        files = sorted(self.dir.glob("*.safetensors"))
        if not files:
            raise CorruptError(f"{self.dir} holds no *.safetensors; make the checkpoint again")
        return {entry.name: entry for file in files for entry in _entries(file)}

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies.

        Raises:
            CorruptError: There is no such tensor.
        """
        if name not in self.tensors:
            raise CorruptError(f"{self.dir}: tensor {name} is missing; make the checkpoint again")
        return self.tensors[name]

    def read(self, name: str) -> NDArray[Any]:
        """A tensor as a read-only memory map of its own dtype and shape.

        Raises:
            CorruptError: There is no such tensor, or it is empty.
        """
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
        """A scale: a tensor with one element, as float32."""
        import numpy as np

        return np.float32(self.read(name).reshape(-1)[0])

    def is_fp8(self, module: str) -> bool:
        """Whether the linear `module` is stored as FP8 with both of its scales."""
        entry = self.tensors.get(f"{module}.weight")
        return entry is not None and entry.dtype == "float8_e4m3fn"

    @cached_property
    def fp8_linears(self) -> tuple[str, ...]:
        """Module names of all FP8 linears."""
        return tuple(
            name.removesuffix(".weight")
            for name, entry in self.tensors.items()
            if entry.dtype == "float8_e4m3fn"
        )


def _entries(file: Path) -> Iterator[TensorEntry]:
    """Parse a safetensors header: 8 bytes length, JSON, then the data.

    Source of the format: the safetensors README, "Format".
    """
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length < file.stat().st_size:
            raise CorruptError(f"{file} is not a safetensors file; make the checkpoint again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CorruptError(f"{file} has a broken safetensors header: {error}") from error
    size_bytes = file.stat().st_size
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        begin, end = fields["data_offsets"]
        if 8 + length + end > size_bytes:
            raise CorruptError(
                f"{file} is truncated: {size_bytes} bytes, tensor {name} ends at "
                f"{8 + length + end}; make the checkpoint again"
            )
        if fields["dtype"] not in _DTYPES:
            raise CorruptError(f"{file}: tensor {name} has the unknown dtype {fields['dtype']}")
        yield TensorEntry(
            name=name,
            file=file,
            offset=8 + length + begin,
            size_bytes=end - begin,
            dtype=_DTYPES[fields["dtype"]],
            shape=tuple(fields["shape"]),
        )
