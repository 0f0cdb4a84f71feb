"""`manifest.json`: what a package is, and the size and SHA-256 of every file in it.

Its bytes are RFC 8785 canonical JSON; their SHA-256 is the digest that names the package. It holds
only what the build determines: no times, no measurements, no acceptance settings, and not its own
version, which every reader derives. So the same build output has the same digest whenever and
wherever it is sealed.

Reading is strict, since a manifest decides what is loaded into a GPU: bounded, canonical bytes
only, the known schema only, and paths that cannot leave the package. Unknown keys are refused: a
`match` rule that a reader does not know could be the one that says "not on this card".
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import rfc8785
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pipeline.core.errors import CorruptError, RecipeError
from pipeline.core.settings import STRICT
from pipeline.core.values import Engine, FileDigest, Licence, Redistribution, Weights
from pipeline.registry.disk import read_bounded
from pipeline.registry.paths import paths_fault
from pipeline.registry.reference import check_part, derive_version
from pipeline.registry.store import Place, Store

SCHEMA = 1
MANIFEST = "manifest.json"
ENGINE = "engine"
NOTICE = "NOTICE"
"""File of the engine folder that carries the notice that a licence asks for."""
MAX_MANIFEST_BYTES = 4 << 20
"""About 30,000 files; an engine has some ten. The manifest limit of OCI registries, too
(distribution-spec 1.1, "Pushing manifests")."""


# The largest integer that every JSON reader keeps exact (RFC 8785, section 3.2.2.3): 2^53 - 1.
_Count = Annotated[int, Field(ge=1, le=2**53 - 1)]
_Bytes = Annotated[int, Field(ge=0, le=2**53 - 1)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FileEntry:
    """One file; `path` is relative to the package."""

    path: _Text
    size: _Bytes
    sha256: _Sha256


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Runtime:
    """What loads the engine, in exactly this version."""

    name: _Text
    version: _Text


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Match:
    """Where the engine runs; an empty list or null means any."""

    sm: list[_Count]
    cards: list[_Text]
    min_vram_bytes: _Bytes
    runtime: Runtime
    cuda: _Text | None
    driver_min: _Text | None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LimitsEntry:
    """`pipeline.core.values.Limits`."""

    max_batch_size: _Count
    max_seq_len: _Count
    max_num_tokens: _Count
    kv_cache_dtype: _Text


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Serve:
    """Arguments for the runtime's server."""

    args: list[str]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Source:
    """Whose weights these are; `digest` identifies their bytes."""

    origin: _Text
    commit: _Text | None
    digest: _Sha256
    note: str
    random: bool


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BuildEntry:
    """Versions of the tools, and the resolved configuration."""

    tools: dict[str, str]
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LicenceEntry:
    """Terms of the weights."""

    spdx: _Text
    files: list[_Text]
    redistribution: Redistribution
    notice: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Manifest:
    """`manifest.json`."""

    schema: Literal[1]
    name: str
    variant: str
    recipe_version: str
    build_key: _Sha256
    format: _Text
    quantization: _Text
    files: Annotated[list[FileEntry], Field(min_length=1)]
    match: Match
    limits: LimitsEntry
    serve: Serve
    source: Source
    ledger: dict[str, Any]
    build: BuildEntry
    licence: LicenceEntry

    def __post_init__(self) -> None:
        check_part("name", self.name)
        check_part("variant", self.variant)
        check_part("recipe_version", self.recipe_version)
        paths = [file.path for file in self.files]
        if fault := paths_fault(paths):
            raise ValueError(f"files: {fault}")
        if paths != sorted(paths):
            raise ValueError("files: not sorted by path")
        for path in paths:
            if not path.startswith("engine/"):
                raise ValueError(f"files: {path!r} is not below engine/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """What a package says that neither its engine nor its weights know.

    Attributes:
        name: The recipe.
        recipe_version: The recipe's own version, such as `1.0`.
        build_key: SHA-256 (64 hex digits) of every input that shaped the bytes.
        config: The resolved recipe less acceptance and registry; JSON values.
        cards: Cards that it was tuned for, as NVML calls them; empty if it is portable.
        quantization: Precision of the quantized linears, such as `fp8`.
        ledger: What was quantized and how far it is from the weights; JSON values.
        cuda: CUDA version that it needs, such as `13.0`; None for any.
        driver_min: Oldest driver, such as `580.65.06`; None for any.
    """

    name: str
    recipe_version: str
    build_key: str
    config: Mapping[str, Any]
    quantization: str
    ledger: Mapping[str, Any]
    cards: Sequence[str] = ()
    cuda: str | None = None
    driver_min: str | None = None


def make_manifest(
    engine: Engine, weights: Weights, label: Label, files: Sequence[FileDigest]
) -> dict[str, Any]:
    """The manifest of a package.

    Args:
        engine: What is in it.
        weights: What the engine was made from.
        label: Its name, version and build.
        files: Every file, with paths relative to the package: `engine/...`.

    Returns:
        Exactly what `parse_manifest` gives for its bytes.

    Raises:
        RecipeError: Name, variant, version or card breaks the grammar of references.
        CorruptError: A path may not be in a package, or a value is of no use; names it.
    """
    check_part("name", label.name)
    check_part("variant", engine.variant)
    check_part("recipe_version", label.recipe_version)
    runtime_name, runtime_version = engine.runtime
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
            "cards": [check_part("card", card) for card in label.cards],
            "min_vram_bytes": engine.min_vram_bytes,
            "runtime": {"name": runtime_name, "version": runtime_version},
            "cuda": label.cuda,
            "driver_min": label.driver_min,
        },
        "limits": engine.limits.to_json(),
        "serve": {"args": list(engine.serve_args)},
        "source": {
            "origin": weights.origin,
            "commit": weights.commit,
            "digest": weights.digest,
            "note": weights.note,
            "random": weights.random,
        },
        "ledger": dict(label.ledger),
        "build": {"tools": dict(engine.tools), "config": dict(label.config)},
        "licence": _licence_json(weights.licence),
    }
    return parse_manifest(manifest_bytes(manifest), f"manifest of {label.name}")


def _licence_json(licence: Licence) -> dict[str, Any]:
    """Terms for a manifest."""
    files = dict.fromkeys((*licence.files, *([NOTICE] if licence.notice else [])))
    return {
        "spdx": licence.spdx,
        "files": list(files),
        "redistribution": licence.redistribution,
        "notice": licence.notice,
    }


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The bytes whose SHA-256 is the package's digest.

    Raises:
        CorruptError: A value has no canonical JSON: NaN, an integer above 2^53, an object.
    """
    try:
        return rfc8785.dumps(dict(manifest))
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"a manifest cannot hold this: {error}") from error


def digest_bytes(data: bytes) -> str:
    """SHA-256 (hex) of a manifest's bytes."""
    return hashlib.sha256(data).hexdigest()


def read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """Read and check a `manifest.json`.

    Returns:
        Its content and its digest.

    Raises:
        CorruptError: It breaks any rule; names the rule.
    """
    data = read_bounded(path, MAX_MANIFEST_BYTES)
    return parse_manifest(data, str(path)), digest_bytes(data)


def manifest_at(store: Store, place: Place) -> tuple[dict[str, Any], str]:
    """The manifest of a published version, and its digest.

    Raises:
        NotFoundError: No such version.
        CorruptError: It breaks any rule, or lies under another name, variant or version than it
            states: then another writer put it there.
    """
    data = store.read_manifest(place)
    manifest, digest = parse_manifest(data, f"{store.url}: manifest of {place}"), digest_bytes(data)
    own = Place(
        name=manifest["name"],
        variant=manifest["variant"],
        version=derive_version(manifest, digest),
    )
    if own != place:
        raise CorruptError(
            f"{store.url}: what lies under {place} is {own}; who may write there put it in the "
            "wrong place, so remove it"
        )
    return manifest, digest


def files_of(manifest: Mapping[str, Any]) -> list[FileDigest]:
    """The files that a manifest lists, sorted by path."""
    return [
        FileDigest(path=file["path"], size_bytes=file["size"], sha256=file["sha256"])
        for file in manifest["files"]
    ]


def parse_manifest(data: bytes, origin: str) -> dict[str, Any]:
    """Check the bytes of a manifest and return its content.

    Args:
        data: The bytes.
        origin: Where they come from, for messages.

    Raises:
        CorruptError: It breaks any rule; names the rule.
    """
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        canonical = rfc8785.dumps(value) == data
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{origin} is not a manifest: {error}") from error
    schema = value.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        raise CorruptError(
            f"{origin} has schema {schema!r}, this program reads {SCHEMA}; "
            "if a newer enginesmith wrote it, upgrade"
        )
    if not canonical:
        raise CorruptError(f"{origin} is not RFC 8785 canonical JSON, so its digest means nothing")
    try:
        TypeAdapter(Manifest).validate_json(data)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(step) for step in fault['loc'])}: {fault['msg']}".removeprefix(": ")
            for fault in error.errors(include_url=False, include_input=False)[:3]
        )
        raise CorruptError(f"{origin}: {faults}") from error
    except RecipeError as error:
        raise CorruptError(f"{origin}: {error}") from error
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: set[str] = set()
    for key, _ in pairs:
        if key in keys:
            raise ValueError(f"key {key!r} is there twice")
        keys.add(key)
    return dict(pairs)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")
