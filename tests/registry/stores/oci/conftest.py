"""A sealed package with two large files, and a registry in memory to put it into."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline.core.published import FileDigest, Package
from pipeline.registry.manifest import files_of
from pipeline.registry.store import Store
from pipeline.registry.stores.oci import image
from pipeline.registry.stores.publication import WritableStore
from tests.registry.packages import place_of, raw_statement, sealed_package
from tests.registry.stores.oci.server import FakeRegistry

LARGE_BYTES = 1 << 20
PLAN = "engine/model.plan"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Two large files, an empty one, and names that tar finds hard."""
    monkeypatch.setattr(image, "LARGE_BYTES", LARGE_BYTES)
    files = {
        "model.plan": random.Random(0).randbytes(LARGE_BYTES + 5),
        "second.bin": random.Random(1).randbytes(LARGE_BYTES + 1),
        "tokenizer/empty": b"",
        "tokenizer/naïve.json": b"[]",
        f"tokenizer/{'long-' * 30}.json": b"{}",
    }
    return sealed_package(tmp_path / "package", files)


@pytest.fixture
def fake(memory_oci: FakeRegistry) -> FakeRegistry:
    return memory_oci


def put(store: WritableStore, package: Package) -> bool:
    statements = [raw_statement(), raw_statement("provenance")]
    return store.put_package(package, statements, lambda _: None)


def read(store: Store, package: Package, path: str = PLAN, offset: int = 0) -> bytes:
    """A file from `offset` on."""
    file = file_of(package, path)
    with store.open_file(place_of(package), file, offset) as chunks:
        return b"".join(chunks)


def file_of(package: Package, path: str) -> FileDigest:
    return next(one for one in files_of(package.manifest) if one.path == path)


def assert_readable(store: Store, package: Package) -> None:
    """Every byte of every file, from its start and from its middle."""
    assert store.read_manifest(place_of(package)) == (package.dir / "manifest.json").read_bytes()
    for file in files_of(package.manifest):
        for offset in {0, file.size_bytes // 3, file.size_bytes}:
            expected = (package.dir / file.path).read_bytes()[offset:]
            assert read(store, package, file.path, offset) == expected
    assert len(store.read_statements(place_of(package))) == 2
