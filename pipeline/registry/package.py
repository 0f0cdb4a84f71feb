"""Seal an engine folder into a package, and where a package may be published.

    package = seal(staging, engine, weights, label)

Licences decide where: what is gated needs an acknowledgement, what may not be passed on goes to no
public registry, and a rehearsal's random weights to its throw-away one alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.cache import RECORD
from pipeline.core.errors import CorruptError, Fault, RecipeError
from pipeline.core.published import FileDigest, Package
from pipeline.core.values import Engine, Licence, Weights
from pipeline.registry.disk import CHUNK_BYTES, disk_errors, open_regular, write_new
from pipeline.registry.manifest import (
    ENGINE,
    MANIFEST,
    SCHEMA,
    digest_bytes,
    manifest_bytes,
    parse_manifest,
    walk,
)

NOTICE = "NOTICE"
"""File of the engine folder that carries the notice that a licence asks for."""
_REHEARSAL = ".rehearsal"
"""Top-level file of a folder registry that is removed after one rehearsal."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """What a package says that neither its engine nor its weights know."""

    name: str
    recipe_version: str
    build_key: str  # SHA-256 (64 hex digits) of every input that shaped the bytes
    config: Mapping[str, Any]  # the resolved recipe less acceptance and registry; JSON values
    quantization: str  # precision of the quantized linears, such as `fp8`
    ledger: Mapping[str, Any]  # what was quantized, how far it is from the weights; JSON values
    cards: Sequence[str] = ()  # that it was tuned for, as NVML calls them; empty if portable
    cuda: str | None = None  # version that it needs, such as `13.0`; None for any
    driver_min: str | None = None  # oldest driver, such as `580.65.06`; None for any


def make_manifest(
    engine: Engine, weights: Weights, label: Label, files: Sequence[FileDigest]
) -> dict[str, Any]:
    """The manifest of a package: exactly what `parse_manifest` gives for its bytes.

    The paths of `files` are relative to the package: `engine/...`.

    CorruptError if a path may not be in a package, or a value is of no use; names it.
    """
    licence = weights.licence
    texts = dict.fromkeys((*licence.files, *([NOTICE] if licence.notice else [])))
    manifest = {
        "schema": SCHEMA,
        "name": label.name,
        "variant": engine.variant,
        "recipe_version": label.recipe_version,
        "build_key": label.build_key,
        "format": engine.format,
        "quantization": label.quantization,
        "files": [file.to_json() for file in sorted(files, key=lambda file: file.path)],
        "match": {
            "sm": list(engine.sms),
            "cards": list(label.cards),
            "min_vram_bytes": engine.min_vram_bytes,
            "runtime": dict(zip(("name", "version"), engine.runtime, strict=True)),
            "cuda": label.cuda,
            "driver_min": label.driver_min,
        },
        "limits": engine.limits.to_json(),
        "serve": {"args": list(engine.serve_args)},
        "source": {
            name: getattr(weights, name)
            for name in ("origin", "commit", "digest", "note", "random")
        },
        "ledger": dict(label.ledger),
        "build": {"tools": dict(engine.tools), "config": dict(label.config)},
        "licence": {
            "spdx": licence.spdx,
            "files": list(texts),
            "redistribution": licence.redistribution,
            "notice": licence.notice,
        },
    }
    return parse_manifest(manifest_bytes(manifest), f"manifest of {label.name}")


def seal(staging_dir: Path, engine: Engine, weights: Weights, label: Label) -> Package:
    """Copy an engine folder into an empty folder and write its manifest, last.

    Each file is hashed from the bytes that are written. The stage cache's own record and empty
    folders stay behind. A notice that the licence asks for is added to the engine's `NOTICE`.
    CorruptError if the engine folder is empty, or holds something that no package may: a link, a
    FIFO, a path that means another file elsewhere.
    """
    with disk_errors(f"copy the engine to {staging_dir}"):
        files = [
            _copy(engine.dir / path, staging_dir / ENGINE / path, f"{ENGINE}/{path}")
            for path in sorted(walk(engine.dir))
            if path != RECORD
        ]
        if not files:
            raise CorruptError(f"{engine.dir} has no files; run the same command again")
        if weights.licence.notice:
            files = _with_notice(files, staging_dir, weights.licence.notice)
        manifest = make_manifest(engine, weights, label, files)
        write_new(staging_dir / MANIFEST, data := manifest_bytes(manifest))
    return Package(dir=staging_dir, manifest=manifest, digest=digest_bytes(data))


def _copy(source: Path, target: Path, path: str) -> FileDigest:
    digest, size_bytes = hashlib.sha256(), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(source) as reader, target.open("xb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)
            writer.write(chunk)
            size_bytes += len(chunk)
    return FileDigest(path=path, size_bytes=size_bytes, sha256=digest.hexdigest())


def _with_notice(files: list[FileDigest], staging_dir: Path, notice: str) -> list[FileDigest]:
    """Append a notice to the package's `NOTICE`, whatever its case; made when there is none."""
    path = f"{ENGINE}/{NOTICE}"
    present = next((file.path for file in files if file.path.lower() == path.lower()), None)
    target = staging_dir / path
    text = notice.strip() + "\n"
    if present is not None:
        text = f"{(staging_dir / present).read_text('utf-8').rstrip()}\n\n{text}"
        (staging_dir / present).unlink()
    write_new(target, data := text.encode())
    added = FileDigest(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return [*(file for file in files if file.path != present), added]


def require_publishable(licence: Licence, *, public: bool) -> None:
    """Stop a build whose package could not be published, before any download: a RecipeError."""
    faults = []
    if licence.gated and licence.acknowledged != licence.spdx:
        got = f", got {licence.acknowledged}" if licence.acknowledged else ""
        fault = (
            f"these weights are gated, and passing them on binds you to their licence: read it at "
            f"{licence.read_at}, then set source.acknowledge_licence={licence.spdx}{got}"
        )
        faults.append(Fault("source.acknowledge_licence", fault))
    if public and licence.redistribution == "forbidden":
        fault = (
            f"this registry is public, and the recipe does not say that {licence.spdx} "
            "allows to pass the weights on; choose a private registry, or read the licence and set "
            "source.redistribution to what it says: allowed or with-notice"
        )
        faults.append(Fault("registry", fault))
    if faults:
        raise RecipeError(faults)


def require_manifest_publishable(
    manifest: Mapping[str, Any], *, public: bool, throwaway: bool = False
) -> None:
    """Stop a sealed package that may not go where it is about to go, with a RecipeError.

    The registry is `public`, or removed after one rehearsal (`throwaway`).
    """
    if manifest["source"]["random"]:
        if throwaway:
            return
        fault = (
            "this is a rehearsal: its weights are random, so only the throw-away registry of "
            "`enginesmith rehearse` takes it; build the recipe itself to publish an engine"
        )
        raise RecipeError([Fault("registry", fault)])
    licence = manifest["licence"]
    terms = Licence(spdx=licence["spdx"], redistribution=licence["redistribution"])
    require_publishable(terms, public=public)


def mark_throwaway(registry_dir: Path) -> None:
    """Make a registry folder one that takes packages of random weights."""
    registry_dir.mkdir(parents=True, exist_ok=True)
    (registry_dir / _REHEARSAL).touch()


def is_throwaway(registry_dir: Path) -> bool:
    """Whether a registry folder takes packages of random weights."""
    return (registry_dir / _REHEARSAL).exists()
