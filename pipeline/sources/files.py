"""Which files of a Hugging Face folder a build needs, and whether they are what they claim to be.

Weights are safetensors or nothing: a pickle (`*.bin`, `*.pth`) can run code when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from pipeline.core.errors import Fault, NotFoundError, RecipeError
from pipeline.core.json_files import read_json_object
from pipeline.core.safetensors_files import (
    INDEX,
    SINGLE,
    TensorEntry,
    check_index,
    check_shards,
    read_header,
    read_index,
)

CONFIG = "config.json"

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
            message = (
                f"{where} has its weights only as {pickles[0]}, which can run code when it is "
                "read; safetensors are required: choose a commit that has them, or save the model "
                "with save_pretrained() and use source=local"
            )
            raise RecipeError([Fault("source", message)])
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
    return tuple(check_shards(read_index(folder / INDEX), names, where))


def check_weights(folder: Path, shards: Iterable[str]) -> None:
    """Check `config.json`, every shard's header and length, and the index if there is one.

    Raises:
        CorruptError: Names the file and its fault.
    """
    read_json_object(folder / CONFIG)
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        tensors |= read_header(folder / shard)
    if SINGLE not in shards:
        check_index(folder, read_index(folder / INDEX), tensors)
