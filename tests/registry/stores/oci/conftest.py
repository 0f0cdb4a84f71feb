"""A sealed package with two large files, and registries to put it into."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.values import FileDigest, Package
from pipeline.registry.reference import reference_of
from pipeline.registry.stores.oci import OciStore, image, tagged, transport
from pipeline.registry.stores.store import Place, Store
from tests.registry.stores.oci.server import FakeRegistry, fake_registry
from tests.services.docker_registry import RunningRegistry, running_server

STATEMENTS = {
    "build-0123": {"manifest.dsse.json": b"{}", "provenance.dsse.json": b"[]"},
    "model-0123": {"model.sig": b"a signature"},
}
LARGE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """A package, and what a store must say of it."""

    package: Package

    @property
    def place(self) -> Place:
        return Place.of(reference_of(self.package))

    @property
    def files(self) -> list[FileDigest]:
        return [
            FileDigest(path=one["path"], size_bytes=one["size"], sha256=one["sha256"])
            for one in self.package.manifest["files"]
        ]

    def file(self, name: str) -> FileDigest:
        return next(one for one in self.files if one.path == f"engine/{name}")

    def data(self, file: FileDigest) -> bytes:
        return (self.package.dir / file.path).read_bytes()

    def assert_readable(self, store: Store) -> None:
        """Every byte of every file, from its start and from its middle."""
        assert store.read_manifest(self.place) == self.data(
            FileDigest(path="manifest.json", size_bytes=0, sha256="")
        )
        for file in self.files:
            for offset in {0, file.size_bytes // 3, file.size_bytes}:
                with store.open_file(self.place, file, offset) as chunks:
                    assert b"".join(chunks) == self.data(file)[offset:]


@pytest.fixture
def seal_package(bench: Any, tmp_path: Path) -> Any:
    """Makes packages: `seal_package(seed)`, with other bytes for every seed."""

    def make(seed: int = 0, version: str = "1.0", large_bytes: int = LARGE_BYTES) -> Sealed:
        engine = bench.engine(random.Random(seed).randbytes(large_bytes + 5))
        (engine.dir / "second.bin").write_bytes(random.Random(seed + 1).randbytes(LARGE_BYTES + 1))
        (engine.dir / "tokenizer" / "empty").write_bytes(b"")
        (engine.dir / "tokenizer" / "naïve.json").write_text("[]")
        (engine.dir / "tokenizer" / f"{'long-' * 30}.json").write_text("{}")
        folder = tmp_path / f"package-{seed}-{version}-{large_bytes}"
        folder.mkdir()
        return Sealed(package=bench.seal(folder, engine, bench.label(version)))

    return make


@pytest.fixture
def sealed(seal_package: Any) -> Sealed:
    package: Sealed = seal_package()
    return package


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[RunningRegistry]:
    with running_server(tmp_path / "registry") as running:
        yield running


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials, no notes of other tests; and nobody waits long for what comes at once."""
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker-config"))
    monkeypatch.delenv("ENGINESMITH_OCI_USERNAME", raising=False)
    monkeypatch.delenv("ENGINESMITH_OCI_PASSWORD", raising=False)
    monkeypatch.setattr(image, "LARGE_BYTES", LARGE_BYTES)
    monkeypatch.setattr(tagged, "SETTLE_S", 0.01)
    monkeypatch.setattr(transport, "BACKOFF_S", 0.02)


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with fake_registry() as running:
        yield running


def put(store: OciStore, sealed: Sealed) -> bool:
    return store.put_package(sealed.package, STATEMENTS, lambda count: None)


def plan(store: OciStore, sealed: Sealed, offset: int = 0) -> bytes:
    """The bytes of its largest file."""
    with store.open_file(sealed.place, sealed.file("model.plan"), offset) as chunks:
        return b"".join(chunks)
