"""Safetensors files: strict headers, the shards that count, and a header for one's own data.

Only headers are read, so that a truncated 5 GB shard is found in milliseconds. The rules are those
of the format's specification (safetensors 0.6, README, "Format"): no duplicate key, and tensors
that fill the data without a gap, an overlap or a byte left over.
"""

from __future__ import annotations

import json
import logging
import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.errors import CorruptError
from pipeline.core.settings import read_json_object

log = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Dtype(NamedTuple):
    """An element type: the format's tag (`BF16`) and bits."""

    tag: str
    bits: int


DTYPES: Mapping[str, Dtype] = {
    "bool": Dtype("BOOL", 8),
    "uint8": Dtype("U8", 8),
    "int8": Dtype("I8", 8),
    "uint16": Dtype("U16", 16),
    "int16": Dtype("I16", 16),
    "uint32": Dtype("U32", 32),
    "int32": Dtype("I32", 32),
    "uint64": Dtype("U64", 64),
    "int64": Dtype("I64", 64),
    "float4_e2m1fn": Dtype("F4", 4),
    "float6_e2m3fn": Dtype("F6_E2M3", 6),
    "float6_e3m2fn": Dtype("F6_E3M2", 6),
    "float8_e4m3fn": Dtype("F8_E4M3", 8),
    "float8_e5m2": Dtype("F8_E5M2", 8),
    "float8_e8m0fnu": Dtype("F8_E8M0", 8),
    "float16": Dtype("F16", 16),
    "bfloat16": Dtype("BF16", 16),
    "float32": Dtype("F32", 32),
    "float64": Dtype("F64", 64),
    "complex64": Dtype("C64", 64),
}
"""Every dtype of the format (safetensors 0.6, `Dtype`) by its NumPy (or ml_dtypes) name."""

_NAMES = {dtype.tag: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library, `MAX_HEADER_SIZE`
_ALIGNMENT_BYTES = 8
"""A written header is padded with spaces to this size, so that data is aligned."""
_AGAIN = "fetch the file again, or make it again"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, byte range in it, dtype (NumPy's name) and shape."""

    name: str
    file: Path
    offset: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]


class TensorSpec(NamedTuple):
    """One tensor to write: name, dtype (NumPy's name) and shape."""

    name: str
    dtype: str
    shape: Sequence[int]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].bits // 8


def safetensors_header(
    tensors: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Length, then JSON of every tensor, in the order of the data, which begins right after."""
    fields: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.size_bytes
        fields[tensor.name] = {
            "dtype": DTYPES[tensor.dtype].tag,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text


def folder_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint folder, by name, in file order; a `CorruptError` if broken.

    The files that count are those that `model.safetensors.index.json` names; without an index,
    `model.safetensors`; without that, all but a second copy in another layout (`consolidated*`).
    What is left out is logged.
    """
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    weight_map = read_index(folder / INDEX) if (folder / INDEX).is_file() else None
    if weight_map is not None:
        used = check_shards(weight_map, present, str(folder))
    elif SINGLE in present:
        used = [SINGLE]
    else:
        used = [name for name in present if not name.startswith("consolidated")]
    if not used:
        raise CorruptError(f"{folder} holds no *.safetensors; make the checkpoint again")
    if ignored := sorted(set(present) - set(used)):
        reason = f"{INDEX} does not name" if weight_map is not None else f"are beside {used[0]}"
        log.warning("%s: not read: %s, which %s", folder, ", ".join(ignored), reason)
    tensors: dict[str, TensorEntry] = {}
    for name in used:
        for entry in read_header(folder / name).values():
            if (other := tensors.get(entry.name)) is not None:
                raise CorruptError(
                    f"{folder}: tensor {entry.name} is in {other.file.name} and in {name}; the "
                    "files are of different checkpoints: keep those of one"
                )
            tensors[entry.name] = entry
    check_index(folder, weight_map or {}, tensors)
    return tensors


def check_shards(weight_map: Mapping[str, str], present: Iterable[str], where: str) -> list[str]:
    """Names of the shards of an index, sorted, which must lie beside it, among `present`."""
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if "/" in shard or not shard.endswith(".safetensors"):
            raise CorruptError(f"{where}: {INDEX} names {shard!r}, wanted *.safetensors beside it")
    if missing := sorted(set(shards) - set(present)):
        raise CorruptError(
            f"{where}: {len(missing)} of the {len(shards)} files that {INDEX} names are missing: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; copy or fetch them"
        )
    return shards


def check_index(
    folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]
) -> None:
    """Demand that every tensor is in the shard that the index names; else a `CorruptError`."""
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CorruptError(
                f"{folder / shard}: {name} is missing, although {INDEX} says that it is here; "
                "the shards and the index are of different models"
            )


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard name, as an index says; a `CorruptError` if it is none."""
    weight_map = read_json_object(path).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise CorruptError(f"{path}: `weight_map` must map tensor names to file names")
    return weight_map


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file by name, in header order; a `CorruptError` for a broken file."""
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        if prefix == b"version ":  # the first word of a pointer, git-lfs docs/spec.md
            raise CorruptError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`")
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or 8 + header_bytes > size_bytes:
            raise CorruptError(
                f"{path}: truncated or no safetensors file: {size_bytes:,} bytes, its header alone "
                f"wants {8 + header_bytes:,}; {_AGAIN}"
            )
        if header_bytes > _MAX_HEADER_BYTES:
            raise _bad_header(path, f"{header_bytes:,} bytes long, at most {_MAX_HEADER_BYTES:,}")
        raw = stream.read(header_bytes)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad_header(path, str(error)) from error
    if not isinstance(header, dict):
        raise _bad_header(path, "not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    entries = {name: _entry(path, name, fields, start) for name, fields in header.items()}
    data_bytes = _covered_bytes(path, entries.values(), start)
    if (present := size_bytes - start) != data_bytes:
        fault = "truncated" if present < data_bytes else "too long"
        raise CorruptError(
            f"{path}: {fault}: {present:,} bytes of tensors, its header says {data_bytes:,}; "
            f"{_AGAIN}"
        )
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that appears twice would hide one of two tensors."""
    counts = Counter(key for key, _ in pairs)
    if twice := [key for key, count in counts.items() if count > 1]:
        raise ValueError(f"duplicate key {twice[0]!r}")
    return dict(pairs)


def _entry(path: Path, name: str, fields: Any, start: int) -> TensorEntry:
    try:
        shape, (begin, end) = fields["shape"], fields["data_offsets"]
        dtype = _NAMES[fields["dtype"]]
        sane = isinstance(shape, list) and all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        )
    except (TypeError, KeyError, ValueError) as error:
        raise _bad_header(path, f"{name}: {fields!r:.80}") from error
    if not sane or math.prod(shape) * DTYPES[dtype].bits != 8 * (end - begin):
        raise _bad_header(path, f"{name}: dtype, shape and offsets disagree: {fields!r:.80}")
    return TensorEntry(name, path, start + begin, end - begin, dtype, tuple(shape))


def _covered_bytes(path: Path, entries: Iterable[TensorEntry], start: int) -> int:
    """Bytes that the tensors take, which must follow each other without gap or overlap."""
    covered = start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.size_bytes)):
        if entry.offset != covered:
            fault = "overlaps the tensor before it" if entry.offset < covered else "leaves a gap"
            where = f"offset {entry.offset - start:,}, wanted {covered - start:,}"
            raise _bad_header(path, f"{entry.name} {fault} ({where})")
        covered += entry.size_bytes
    return covered - start


def _bad_header(path: Path, fault: str) -> CorruptError:
    return CorruptError(f"{path}: bad safetensors header: {fault}; {_AGAIN}")
