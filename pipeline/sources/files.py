"""Which files of a Hugging Face folder a build needs, and whether they are what they claim to be.

Weights are safetensors or nothing: a pickle (`*.bin`, `*.pth`) can run code when it is read. Of a
safetensors file only the header is read, so that a truncated 5 GB shard is found in milliseconds.
The rules are those of the format's specification (safetensors 0.6, README, "Format"): no duplicate
key, and tensors that fill the data without a gap, an overlap or a byte left over.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from pipeline.core.errors import CorruptError, Fault, NotFoundError, RecipeError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_TOKENIZER = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json"})
"""Any one of these is a tokenizer; the other tokenizer files only adorn it."""

_SUPPORT = _TOKENIZER | {
    CONFIG,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
}
_TERMS = re.compile(r"(licen[cs]e|notice|use_policy|copying)", re.IGNORECASE)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library, `MAX_HEADER_SIZE`


def check_listing(names: Collection[str], where: str) -> None:
    """Refuse a folder or repository by the names of its files alone.

    Args:
        names: Its top-level files.
        where: What to call it in messages.

    Raises:
        NotFoundError: No `config.json`, tokenizer or weights.
        RecipeError: Weights there are, but only as pickles.
    """
    if CONFIG not in names:
        raise NotFoundError(
            f"{where} has no {CONFIG}; it must be a model that Transformers can load, not an "
            "adapter or another runtime's files"
        )
    if SINGLE not in names and INDEX not in names:
        pickles = [name for name in sorted(names, key=len) if name.endswith(_PICKLES)]
        if pickles:
            raise RecipeError(
                [
                    Fault(
                        "source",
                        f"{where} has its weights only as {pickles[0]}, which can run code when "
                        "it is read; safetensors are required: choose a commit that has them, or "
                        "save the model with save_pretrained() and use source=local",
                    )
                ]
            )
        raise NotFoundError(f"{where} has no weights: neither {SINGLE} nor {INDEX}")
    if not _TOKENIZER & set(names):
        raise NotFoundError(
            f"{where} has no tokenizer, wanted one of {', '.join(sorted(_TOKENIZER))}; "
            "copy it from the model that this one was made from"
        )


def support_files(names: Iterable[str]) -> tuple[str, ...]:
    """The files that a build needs besides the weights: configuration, tokenizer, terms.

    Never among them: code (`*.py`), pickles, other formats, anything in a subfolder.
    """
    present = set(names)
    wanted = _SUPPORT if SINGLE in present else _SUPPORT | {INDEX}
    return tuple(sorted(present & wanted) + sorted(terms_files(present)))


def terms_files(names: Iterable[str]) -> tuple[str, ...]:
    """Licence, notice and use-policy files among top-level `names`."""
    return tuple(
        sorted(
            name
            for name in names
            if _TERMS.match(name) and "/" not in name and not name.endswith((".py", *_PICKLES))
        )
    )


def weight_files(names: Collection[str], folder: Path, where: str) -> tuple[str, ...]:
    """The safetensors to load: `model.safetensors`, else what the index names.

    Transformers looks in the same order. A second copy (`consolidated*.safetensors`) is in neither.

    Args:
        names: Top-level files of the whole folder or repository.
        folder: Where its index lies.
        where: What to call it in messages.

    Raises:
        CorruptError: The index is unreadable, or names files that are not there.
    """
    if SINGLE in names:
        return (SINGLE,)
    shards = sorted(set(_weight_map(folder / INDEX).values()))
    for shard in shards:
        if "/" in shard or not shard.endswith(".safetensors"):
            raise CorruptError(f"{where}: {INDEX} names {shard!r}, wanted *.safetensors beside it")
    if missing := [shard for shard in shards if shard not in names]:
        raise CorruptError(
            f"{where}: {len(missing)} of the {len(shards)} files that {INDEX} names are missing: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; copy or fetch them"
        )
    return tuple(shards)


def check_weights(folder: Path, shards: Iterable[str]) -> None:
    """Check `config.json`, every shard's header and length, and the index if there is one.

    Raises:
        CorruptError: Names the file and its fault.
    """
    read_json_object(folder / CONFIG)
    tensors = {shard: check_safetensors(folder / shard) for shard in shards}
    if SINGLE in tensors:
        return
    for tensor, shard in _weight_map(folder / INDEX).items():
        if tensor not in tensors[shard]:
            raise CorruptError(
                f"{folder / shard}: {tensor} is missing, although {INDEX} says that it is here; "
                "the shards and the index are of different models"
            )


def check_safetensors(path: Path) -> frozenset[str]:
    """Names of the tensors in `path`, after checking its header against its length.

    Raises:
        CorruptError: Truncated, longer than its header says, or a header that breaks the format.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        if prefix == b"version ":  # the first word of a pointer, git-lfs docs/spec.md
            raise CorruptError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`")
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or 8 + header_bytes > size:
            raise CorruptError(
                f"{path}: truncated or no safetensors file: {size:,} bytes, its header alone "
                f"wants {8 + header_bytes:,}; fetch it again"
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
    data_bytes = _check_layout(path, header)
    if (present := size - 8 - header_bytes) != data_bytes:
        fault = "truncated" if present < data_bytes else "too long"
        raise CorruptError(
            f"{path}: {fault}: {present:,} bytes of tensors, its header says {data_bytes:,}; "
            "fetch it again"
        )
    return frozenset(header)


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CorruptError: It is something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: not JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{path}: a JSON {type(value).__name__}, wanted an object")
    return value


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard name, as the index says."""
    weight_map = read_json_object(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise CorruptError(f"{index}: `weight_map` must map tensor names to file names")
    return weight_map


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that appears twice would hide one of two tensors."""
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key {twice!r}")
    return value


def _check_layout(path: Path, header: dict[str, Any]) -> int:
    """Bytes that the tensors take, which must follow each other without gap or overlap."""
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        try:
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            bits = _DTYPE_BITS[entry["dtype"]] * math.prod(shape)
            sane = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        except (TypeError, KeyError, ValueError) as error:
            raise _bad_header(path, f"{name}: {entry!r:.80}") from error
        if not sane or bits != 8 * (end - begin):
            raise _bad_header(path, f"{name}: dtype, shape and offsets disagree: {entry!r:.80}")
        spans.append((begin, end, name))
    covered = 0
    for begin, end, name in sorted(spans):
        if begin != covered:
            fault = "overlaps the tensor before it" if begin < covered else "leaves a gap before it"
            raise _bad_header(path, f"{name} {fault} (offset {begin:,}, wanted {covered:,})")
        covered = end
    return covered


def _bad_header(path: Path, fault: str) -> CorruptError:
    return CorruptError(f"{path}: bad safetensors header: {fault}; fetch it again")
