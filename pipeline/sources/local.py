"""Weights in a folder of yours, such as a fine-tune: read where they are, never copied.

Their identity is their content, so every file is hashed on every run (about 1 GB/s): an edit that
keeps size and time is still noticed.
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from pipeline.core.cache import sha256_file
from pipeline.core.errors import NotFoundError
from pipeline.core.progress import BYTES, progress
from pipeline.core.published import FileDigest
from pipeline.core.settings import STRICT, PathField
from pipeline.core.values import Weights
from pipeline.sources.weights import (
    Licensed,
    check_listing,
    check_weights,
    support_files,
    weight_files,
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LocalSource(Licensed):
    """A Hugging Face folder on this machine: `config.json`, safetensors and a tokenizer."""

    path: PathField

    @property
    def origin(self) -> str:
        """Without parent folders, which are private."""
        return f"local:{self.path.name}"

    def fetch(self) -> Weights:
        folder = self.path.expanduser().resolve()
        if not folder.is_dir():
            raise NotFoundError(f"source.path: {folder} is not a folder; it must hold a model")
        present = {path.name for path in folder.iterdir() if path.is_file()}
        check_listing(present, str(folder))
        shards = weight_files(present, folder, str(folder))
        check_weights(folder, shards)
        names = sorted((*support_files(present), *shards))
        sizes = {name: (folder / name).stat().st_size for name in names}
        files = []
        with progress(f"Hashing {folder.name}", sum(sizes.values()), BYTES) as advance:
            for name, size_bytes in sizes.items():
                digest = sha256_file(folder / name)
                files.append(FileDigest(path=name, size_bytes=size_bytes, sha256=digest))
                advance(size_bytes)
        return self.weights(folder, tuple(files))


KIND = LocalSource
