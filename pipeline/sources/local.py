"""Weights in a folder of yours, such as a fine-tune: read where they are, never copied.

Their identity is their content, so every file is hashed on every run (about 1 GB/s): an edit that
keeps size and time is still noticed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic.dataclasses import dataclass

from pipeline.core.cache import sha256_file
from pipeline.core.errors import NotFoundError
from pipeline.core.progress import BYTES, progress
from pipeline.core.settings import STRICT, PathField
from pipeline.core.values import FileDigest, Licence, Redistribution, Weights
from pipeline.sources.files import (
    check_listing,
    check_weights,
    support_files,
    terms_files,
    weight_files,
)
from pipeline.sources.store import disk_faults_explained
from pipeline.sources.terms import check_notice


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LocalSource:
    """A Hugging Face folder on this machine.

    Attributes:
        path: Folder with `config.json`, safetensors and a tokenizer.
        licence: SPDX identifier of the terms that its weights are under; those of the model that
            was fine-tuned count too.
        redistribution: Whether that licence lets a package go where everybody can read it.
        notice: Text that must travel with the weights.
    """

    path: PathField
    licence: str
    redistribution: Redistribution = "forbidden"
    notice: str = ""

    def __post_init__(self) -> None:
        check_notice(self.redistribution, self.notice)

    @property
    def origin(self) -> str:
        """For people and the manifest; without parent folders, which are nobody else's business."""
        return f"local:{self.path.name}"

    @property
    def terms(self) -> Licence:
        """What the recipe says about the licence."""
        return Licence(spdx=self.licence, redistribution=self.redistribution, notice=self.notice)

    def fetch(self) -> Weights:
        """Check the folder and hash what a build needs of it.

        Raises:
            NotFoundError: No such folder, or no model, weights or tokenizer in it.
            RecipeError: Its weights are pickles.
            CorruptError: A file is truncated or breaks its format; names file and fault.
            AccessError: It may not be read.
        """
        folder = self.path.expanduser().resolve()
        if not folder.is_dir():
            raise NotFoundError(f"source.path: {folder} is not a folder; it must hold a model")
        with disk_faults_explained():
            present = {path.name for path in folder.iterdir() if path.is_file()}
            check_listing(present, str(folder))
            shards = weight_files(present, folder, str(folder))
            check_weights(folder, shards)
            files = _digests(folder, sorted((*support_files(present), *shards)))
        return Weights(
            dir=folder,
            origin=self.origin,
            commit=None,
            files=files,
            licence=replace(self.terms, files=terms_files(present)),
        )


def _digests(folder: Path, names: list[str]) -> tuple[FileDigest, ...]:
    """Digest of each named file, showing how far it is."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    files = []
    with progress(f"Hashing {folder.name}", sum(sizes.values()), BYTES) as advance:
        for name, size_bytes in sizes.items():
            digest = sha256_file(folder / name)
            files.append(FileDigest(path=name, size_bytes=size_bytes, sha256=digest))
            advance(size_bytes)
    return tuple(files)


KIND = LocalSource
