"""Small sealed packages and unsigned statements for the tests of stores."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.published import Package, Reference
from pipeline.core.values import Engine, Licence, Limits, Weights
from pipeline.registry.manifest import files_of
from pipeline.registry.package import Label, seal
from pipeline.registry.reference import reference_of
from pipeline.registry.store import ENVELOPE, Place, RawStatement, Store

VARIANT = "sm89-trtrtx-fp8-b8-s1024"
APACHE = Licence(spdx="Apache-2.0", files=("LICENSE",))
RUNTIME = ("tensorrt-rtx", "1.7.1.116")
FILES = {"model.plan": b"plan" * 100, "tokenizer/tokenizer.json": b"{}"}


def make_engine(
    folder: Path,
    files: Mapping[str, bytes] = FILES,
    variant: str = VARIANT,
    runtime: tuple[str, str] = RUNTIME,
) -> Engine:
    """An engine with these files in `folder`."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return Engine(
        dir=folder,
        digest="e" * 64,
        format="trtrtx",
        variant=variant,
        runtime=runtime,
        sms=(89,),
        limits=Limits(
            max_batch_size=8, max_seq_len=1024, max_num_tokens=1024, kv_cache_dtype="bfloat16"
        ),
        min_vram_bytes=1 << 30,
        tools=dict([runtime]),
    )


def seal_engine(
    folder: Path,
    engine: Engine,
    *,
    name: str = "tiny",
    recipe_version: str = "1.0",
    build_key: str = "b" * 64,
    licence: Licence = APACHE,
) -> Package:
    """A package in `folder`."""
    folder.mkdir(parents=True)
    weights = Weights(
        dir=folder,
        origin="hub:someone/tiny",
        commit="0" * 40,
        files=(),
        licence=licence,
    )
    label = Label(
        name=name,
        recipe_version=recipe_version,
        build_key=build_key,
        config={"quantizer": {"calib_size": 64}},
        quantization="fp8",
        ledger={},
    )
    return seal(folder, engine, weights, label)


def sealed_package(
    folder: Path,
    files: Mapping[str, bytes] = FILES,
    *,
    variant: str = VARIANT,
    runtime: tuple[str, str] = RUNTIME,
    **label: Any,
) -> Package:
    """A package in `folder`; equal arguments give equal digests."""
    engine = make_engine(folder.with_name(f"{folder.name}-engine"), files, variant, runtime)
    return seal_engine(folder, engine, **label)


def place_of(package: Package | Reference) -> Place:
    """Where a package is published."""
    return Place.of(reference_of(package) if isinstance(package, Package) else package)


def raw_statement(kind: str = "signature", text: str = "1", **files: bytes) -> RawStatement:
    """A statement without a signature; `report_json=b""` makes the file `report.json`."""
    envelope = f'{{"payload": "{text}"}}'.encode()
    name = f"{kind}-{hashlib.sha256(envelope).hexdigest()[:16]}"
    attachments = {file.replace("_", "."): data for file, data in files.items()}
    return RawStatement(name=name, files={ENVELOPE: envelope} | attachments)


def read_back(store: Store, package: Package) -> dict[str, bytes]:
    """Path -> bytes of every file of a published package, as a reader gets them."""
    found = {}
    for file in files_of(package.manifest):
        with store.open_file(place_of(package), file) as chunks:
            found[file.path] = b"".join(chunks)
    return found


def read_files(store: Store, place: Place, name: str) -> dict[str, bytes]:
    """A statement's envelope, and every file that it names."""
    (raw,) = store.read_statements(place, {name})
    payload = json.loads(base64.b64decode(json.loads(raw.envelope)["payload"]))
    named = payload["predicate"]["enginesmith_statement"]["files"]
    return {ENVELOPE: raw.envelope, **store.read_attachments(place, name, named)}


def envelopes(statements: Iterable[RawStatement]) -> dict[str, bytes]:
    """Name -> envelope."""
    return {statement.name: statement.envelope for statement in statements}
