"""The frozen values that stages hand to each other; what is published has core/published.py.

    Weights -> Checkpoint -> Engine -> Package -> Report -> Verdict -> Reference

Every folder that a value names is complete and never changes again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.core.published import (
    PASSING,
    Failing,
    FileDigest,
    Package,
    Redistribution,
    VerdictName,
    digest_of,
)

Format = str
"""Name of an engine format: a folder of pipeline/formats that has a `spec`."""


@dataclass(frozen=True, kw_only=True)
class Licence:
    """Terms of the weights."""

    spdx: str  # SPDX identifier, or `LicenseRef-...` for terms that have none
    files: tuple[str, ...] = ()  # in `Weights.dir`, that state them
    redistribution: Redistribution = "forbidden"  # whether a package may go to a public registry
    notice: str = ""  # text that must travel with the weights; empty for none
    gated: bool = False  # the weights are given only to those who accepted the terms
    acknowledged: str | None = None  # that the recipe says has been read and accepted
    read_at: str = "their source"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A Hugging Face folder: `config.json`, safetensors, tokenizer, licence files."""

    dir: Path
    origin: str  # for people and the manifest: `hub:microsoft/Phi-3-mini-4k-instruct`
    commit: str | None
    files: tuple[FileDigest, ...]  # every file in `dir`; together they identify the weights
    licence: Licence
    note: str = ""  # what a reader must know about these weights: that they were 4-bit once
    random: bool = False  # numbers, for a rehearsal; such a package is published nowhere

    @property
    def digest(self) -> str:
        return digest_of([file.to_json() for file in self.files])


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A ModelOpt unified checkpoint with tokenizer and `calibration.json`."""

    dir: Path
    digest: str
    weights: Weights
    precision: str  # a name that `pipeline.quant.spec` knows
    quantized_linears: tuple[str, ...]  # Hugging Face module names of those stored in it
    kept_16bit: tuple[str, ...]  # of those left in bfloat16 (lm_head not among them)
    calibration: Mapping[str, Any]  # the record: text digest, token count, amax per layer

    @property
    def ledger(self) -> Mapping[str, Any]:
        """What was rounded and what it cost, for the manifest (pipeline.quant.modelopt)."""
        found: Mapping[str, Any] = self.calibration["ledger"]
        return found


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine was built for. `max_seq_len` counts prompt + output tokens of one request."""

    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    kv_cache_dtype: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What a runtime loads: the future `engine/` folder of a package, self-contained."""

    dir: Path
    digest: str
    format: Format
    variant: str  # middle part of a reference, such as `sm89-trtrtx-fp8-b64-s1024`
    runtime: tuple[str, str]
    sms: tuple[int, ...]  # compute capabilities x 10 it runs on (89 = Ada); empty for any
    limits: Limits
    min_vram_bytes: int  # device memory that it needs at its limits
    serve_args: tuple[str, ...] = ()
    cpu_graph_dir: Path | None = None  # with the same graph for ONNX Runtime on a CPU
    tools: Mapping[str, str] = field(default_factory=dict)
    checks: Mapping[str, Any] = field(default_factory=dict)  # proven without running it


def engine_of(package: Package) -> Engine:
    """The engine inside a package, as the manifest describes it."""
    manifest, match = package.manifest, package.manifest["match"]
    return Engine(
        dir=package.engine_dir,
        digest=package.digest,
        format=manifest["format"],
        variant=manifest["variant"],
        runtime=(match["runtime"]["name"], match["runtime"]["version"]),
        sms=tuple(match["sm"]),
        limits=Limits(**manifest["limits"]),
        min_vram_bytes=match["min_vram_bytes"],
        serve_args=tuple(manifest["serve"]["args"]),
        tools=dict(manifest["build"]["tools"]),
    )


@dataclass(frozen=True)
class Finding:
    """One thing that acceptance noticed: measured, required, and what to do."""

    kind: Literal[Failing, "note"]
    message: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judge's word, with its reasons."""

    name: VerdictName
    findings: tuple[Finding, ...] = ()

    @property
    def passed(self) -> bool:
        return self.name in PASSING


@dataclass(frozen=True, kw_only=True)
class Report:
    """What acceptance measured; `to_json` is `report.json`, schema 1; empty: not asked."""

    digest: str
    card: str  # that the engine is for, such as `NVIDIA-GeForce-RTX-4090`
    conditions: Mapping[str, Any]
    speed: Sequence[Mapping[str, Any]]  # one entry per workload
    quality: Mapping[str, Any]  # perplexities, KL, agreement, with intervals
    not_run: Sequence[str]
    checks: Mapping[str, Any]  # what was proven about the engine without running it
    chat: Mapping[str, Any] = field(default_factory=dict)
    sustained: Mapping[str, Any] = field(default_factory=dict)
    # Bandwidth of the card, and each workload's share of its ceiling.
    physics: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self, verdict: Verdict) -> dict[str, Any]:
        """As `report.json`; what was not asked has no key."""
        asked = ("chat", "sustained", "physics")
        parts = {name: part for name, part in vars(self).items() if part or name not in asked}
        findings = [asdict(finding) for finding in verdict.findings]
        return {"schema": 1, **parts, "verdict": verdict.name, "findings": findings}
