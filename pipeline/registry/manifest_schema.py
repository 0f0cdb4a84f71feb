"""Schema 1 of `manifest.json`, as types; imported only when a manifest is checked.

Unknown keys are refused: a `match` rule that a reader does not know could be the one that says
"not on this card".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.core.settings import STRICT
from pipeline.core.values import Redistribution
from pipeline.registry.paths import paths_fault
from pipeline.registry.reference import check_part

# The largest integer that every JSON reader keeps exact (RFC 8785, section 3.2.2.3): 2^53 - 1.
Count = Annotated[int, Field(ge=1, le=2**53 - 1)]
Bytes = Annotated[int, Field(ge=0, le=2**53 - 1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FileEntry:
    """One file; `path` is relative to the package."""

    path: Text
    size: Bytes
    sha256: Sha256


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Runtime:
    """What loads the engine, in exactly this version."""

    name: Text
    version: Text


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Match:
    """Where the engine runs; an empty list or null means any."""

    sm: list[Count]
    cards: list[Text]
    min_vram_bytes: Bytes
    runtime: Runtime
    cuda: Text | None
    driver_min: Text | None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LimitsEntry:
    """`pipeline.core.values.Limits`."""

    max_batch_size: Count
    max_seq_len: Count
    max_num_tokens: Count
    kv_cache_dtype: Text


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Serve:
    """Arguments for the runtime's server."""

    args: list[str]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Source:
    """Whose weights these are; `digest` identifies their bytes."""

    origin: Text
    commit: Text | None
    digest: Sha256
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

    spdx: Text
    files: list[Text]
    redistribution: Redistribution
    notice: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Manifest:
    """`manifest.json`."""

    schema: Literal[1]
    name: str
    variant: str
    recipe_version: str
    build_key: Sha256
    format: Text
    quantization: Text
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
