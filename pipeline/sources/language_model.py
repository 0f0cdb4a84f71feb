"""A multimodal model's language model as a folder of its own: what is built of such a repository.

Engines take text alone, and so does what calibrates and judges them. Tensors keep their bytes;
those outside the language model (vision tower, projector) are left out, as the weights' note says.
"""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.core.cache import digest_folder
from pipeline.core.published import FileDigest
from pipeline.core.safetensors_files import (
    INDEX,
    SINGLE,
    TensorEntry,
    TensorSpec,
    folder_tensors,
    safetensors_header,
)
from pipeline.core.values import Weights
from pipeline.core.workfolder import remove_folder
from pipeline.model.read import language_config, load_config
from pipeline.sources.weights import CONFIG, FILES, cached_files, write_record

_PREFIX = "language_model."
"""Of the language model's tensors in Mistral 3's repositories."""


def language_model(weights: Weights, folder: Path) -> Weights:
    """The same weights, or of a multimodal model's only the language model's, kept in `folder`."""
    stated = load_config(weights.dir)
    if (config := language_config(stated)) is stated:
        return weights
    tensors = folder_tensors(weights.dir)
    kept = {name.removeprefix(_PREFIX): entry for name, entry in tensors.items() if _PREFIX in name}
    files = cached_files(folder, lambda: _write(weights, config, kept, folder))
    others = len(tensors) - len(kept)
    note = f"its language model alone: {others} tensors that read other than text are left out"
    return replace(weights, dir=folder / FILES, files=files, note=note)


def _write(
    weights: Weights, config: Mapping[str, Any], kept: Mapping[str, TensorEntry], folder: Path
) -> tuple[FileDigest, ...]:
    partial = folder.with_name(f"{folder.name}.partial")
    remove_folder(partial)
    remove_folder(folder)
    out_dir = partial / FILES
    out_dir.mkdir(parents=True)
    for file in weights.files:
        if file.path not in (CONFIG, INDEX) and not file.path.endswith(".safetensors"):
            shutil.copyfile(weights.dir / file.path, out_dir / file.path)
    (out_dir / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    specs = [TensorSpec(name, entry.dtype, entry.shape) for name, entry in kept.items()]
    with (out_dir / SINGLE).open("wb") as stream:
        stream.write(safetensors_header(specs, {"format": "pt"}))
        for entry in kept.values():
            with (
                entry.file.open("rb") as source,
                mmap.mmap(source.fileno(), 0, prot=mmap.PROT_READ) as mapped,
                memoryview(mapped) as view,
                view[entry.offset : entry.offset + entry.size_bytes] as data,
            ):
                stream.write(data)
    files = tuple(digest_folder(out_dir))
    write_record(partial, origin=weights.origin, commit=weights.commit, files=files)
    partial.rename(folder)
    return files
