"""Weights as every source hands them on: files that count, the cache that keeps them, their terms.

    <cache>/weights/hub/<owner>--<name>/<commit>/         made visible by one rename
        weights.json                                      origin, commit, SHA-256 of every file
        files/                                            what `Weights.dir` names

Weights are safetensors or nothing: a pickle (`*.bin`, `*.pth`) can run code when it is read. A
finished folder is taken by its record, sizes, safetensors headers and the digests of all else, in
milliseconds and without a network; who reads the tensors digests them first (`require_files`).
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files as resource_files
from pathlib import Path

import yaml
from pydantic.dataclasses import dataclass

from pipeline.core.cache import require_files
from pipeline.core.errors import CorruptError, Fault, NotFoundError, RecipeError
from pipeline.core.ownership import CACHE, make_own, require_unshared
from pipeline.core.published import FileDigest, Redistribution
from pipeline.core.safetensors_files import (
    INDEX,
    SINGLE,
    TensorEntry,
    check_index,
    check_shards,
    read_header,
    read_index,
)
from pipeline.core.settings import STRICT, cache_root, read_json_object
from pipeline.core.values import Licence, Weights
from pipeline.core.workfolder import hold_lock

log = logging.getLogger(__name__)

CONFIG = "config.json"
RECORD = "weights.json"
FILES = "files"

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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Licensed:
    """What every source of a recipe says about the terms of its weights, as in `Licence`."""

    licence: str
    redistribution: Redistribution = "forbidden"
    notice: str = ""

    def __post_init__(self) -> None:
        if self.redistribution == "with-notice" and not self.notice.strip():
            raise ValueError(
                "redistribution is with-notice, and there is no notice; set source.notice to the "
                "text that the licence asks for"
            )

    @property
    def origin(self) -> str:
        raise NotImplementedError

    @property
    def terms(self) -> Licence:
        return Licence(spdx=self.licence, redistribution=self.redistribution, notice=self.notice)

    def weights(
        self, dir: Path, files: tuple[FileDigest, ...], commit: str | None = None, note: str = ""
    ) -> Weights:
        return Weights(
            dir=dir,
            origin=self.origin,
            commit=commit,
            files=files,
            licence=replace(self.terms, files=terms_files(file.path for file in files)),
            note=note,
        )


def licence_of_hub(tag: str | None) -> Licence:
    """The terms behind a Hub licence tag; an unknown one or None forbids redistribution."""
    name = tag or "unstated"
    return known_licences().get(name, Licence(spdx=f"LicenseRef-{name}"))


@cache
def known_licences() -> dict[str, Licence]:
    """The table that travels with the package, by Hub tag."""
    text = resource_files("pipeline.sources").joinpath("licences.yaml").read_text("utf-8")
    return {row.pop("hub"): Licence(spdx=row.pop("licence"), **row) for row in yaml.safe_load(text)}


def check_listing(names: Collection[str], where: str) -> None:
    """Refuse a folder or repository, called `where` in messages, by its top-level names alone.

    NotFoundError without `config.json`, tokenizer or weights, RecipeError if they are pickles only.
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
    """What a build needs besides the weights: configuration, tokenizer, terms, at the top level."""
    present = set(names)
    wanted = _SUPPORT if SINGLE in present else _SUPPORT | {INDEX}
    return tuple(sorted(present & wanted) + sorted(terms_files(present)))


def terms_files(names: Iterable[str]) -> tuple[str, ...]:
    """Licence, notice and use-policy files among top-level `names`."""
    found = (name for name in names if _TERMS.match(name) and "/" not in name)
    return tuple(sorted(name for name in found if not name.endswith((".py", *_PICKLES))))


def weight_files(names: Collection[str], folder: Path, where: str) -> tuple[str, ...]:
    """The safetensors to load, as Transformers: `model.safetensors`, else what the index names.

    CorruptError if the index is unreadable, or names files that are not among `names`.
    """
    if SINGLE in names:
        return (SINGLE,)
    return tuple(check_shards(read_index(folder / INDEX), names, where))


def check_weights(folder: Path, shards: Iterable[str]) -> None:
    """Check `config.json`, every shard's header and length, and the index if there is one."""
    read_json_object(folder / CONFIG)
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        tensors |= read_header(folder / shard)
    if SINGLE not in shards:
        check_index(folder, read_index(folder / INDEX), tensors)


def weights_root() -> Path:
    """Folder of the weight cache."""
    return cache_root() / "weights"


def lock_path(folder: Path) -> Path:
    """Lock that the makers of one folder of the weight cache wait for."""
    name = "-".join(folder.relative_to(weights_root()).parts)
    return cache_root() / "locks" / f"weights-{name}.lock"


def cached_files(
    folder: Path, make: Callable[[], tuple[FileDigest, ...]]
) -> tuple[FileDigest, ...]:
    """Digests of the files of a cached folder, which `make` fills where it is absent or damaged."""
    if (files := finished_files(folder)) is not None:
        return files
    with hold_lock(lock_path(folder)):  # another run may have finished it while we waited
        make_own(folder.parent, CACHE)
        return finished_files(folder) or make()


def write_record(
    folder: Path, *, origin: str, commit: str | None, files: Sequence[FileDigest]
) -> None:
    """Write the record of `folder`, the last thing before the folder becomes visible."""
    record = {"origin": origin, "commit": commit, "files": [file.to_json() for file in files]}
    with (folder / RECORD).open("w") as stream:
        json.dump(record, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def finished_files(folder: Path) -> tuple[FileDigest, ...] | None:
    """The recorded digests of a finished folder; None when it is absent or damaged."""
    require_unshared(folder, CACHE)
    if not os.path.lexists(folder):
        return None
    try:
        if folder.is_symlink() or not (folder / RECORD).is_file():  # reading a FIFO never ends
            raise ValueError("it has no record")
        record = json.loads((folder / RECORD).read_text())
        files = tuple(FileDigest.from_json(file) for file in record["files"])
        present = {path.name: path.lstat().st_size for path in (folder / FILES).iterdir()}
        if present != {file.path: file.size_bytes for file in files}:
            raise ValueError("its files are not those of its record")
        tensors = [path for path in present if path.endswith(".safetensors")]
        check_weights(folder / FILES, tensors)
        require_files(folder / FILES, [file for file in files if file.path not in tensors])
    except (CorruptError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s); making it again", folder, error)
        return None
    return files
