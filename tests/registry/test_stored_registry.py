"""A registry over any store: on a folder here, on real servers with `-m services`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pipeline.registry.backend import Registry
from pipeline.registry.stores.folder import FolderRegistry
from pipeline.registry.signing.keys import generate_key
from pipeline.registry.signing.signer import build_statements, sign_report
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.signing.verification import verify_signatures
from pipeline.registry.stored import StoredRegistry
from pipeline.registry.stores.store import Place
from tests.registry.signing.conftest import RUN, trusted

from pipeline.core.errors import (
    ConflictError,
    CorruptError,
    NotFoundError,
    RecipeError,
)
from pipeline.core.values import FileDigest, Package
from pipeline.registry.package import verify
from pipeline.registry.stores.folder import FolderStore
from pipeline.registry.stores.opening import open_registry
from tests.registry.backends import Backends, backends, running_backends

Bench = Any
CARD = "NVIDIA-GeForce-RTX-4090"
VARIANT = "sm89-trtrtx-fp8-b8"
_CONF = Path(__file__).parents[2] / "conf" / "registry"


@pytest.fixture(scope="module")
def servers() -> Iterator[Backends]:
    with running_backends() as made:
        yield made


@pytest.fixture(params=backends)
def stored(
    request: pytest.FixtureRequest,
    servers: Backends,
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    """A bench whose registry is over each store."""
    store = servers.store(request.param, tmp_path / "store")
    for name, value in servers.environ(request.param).items():
        monkeypatch.setenv(name, value)
    registry = StoredRegistry(store=store, cache_dir=tmp_path / "cache")
    return dataclasses.replace(bench, registry=registry)


@pytest.fixture
def folder(bench: Bench, tmp_path: Path) -> Bench:
    """The same over a folder, to damage it."""
    store = FolderStore(path=tmp_path / "store")
    registry = StoredRegistry(store=store, cache_dir=tmp_path / "cache")
    return dataclasses.replace(bench, registry=registry)


def _elsewhere(bench: Bench, tmp_path: Path) -> StoredRegistry:
    """The same store as another machine sees it."""
    return StoredRegistry(store=bench.registry.store, cache_dir=tmp_path / "other-machine")


def test_is_a_registry(stored: Bench) -> None:
    assert isinstance(stored.registry, Registry)
    stored.registry.check_writable()
    assert stored.registry.entries() == []


def test_digest_is_that_of_a_folder_registry(stored: Bench, bench: Bench) -> None:
    assert stored.publish() == bench.publish()


def test_published_package_is_found_whole_from_another_machine(
    stored: Bench, tmp_path: Path
) -> None:
    reference = stored.publish()
    other = _elsewhere(stored, tmp_path)
    (found,) = other.find("tiny", VARIANT, "b" * 64)
    assert found.digest == reference.digest
    assert verify(found.dir).digest == reference.digest
    assert found.dir == tmp_path / "other-machine" / "packages" / reference.digest
    assert list(other.find("tiny", VARIANT, "c" * 64)) == []
    assert other.resolve(f"tiny@sha256:{reference.digest}") == found
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


def test_signatures_travel_with_the_package(stored: Bench, tmp_path: Path) -> None:
    key = generate_key()
    with stored.registry.staging() as staging:
        package = stored.seal(staging)
        reference = stored.registry.publish(package, build_statements(package, key, RUN))
    report = stored.report(reference)
    files = {"report.json": report, **sign_report(report, key)}
    written = stored.registry.add_statement(reference, "test-1", files)
    assert (written / "report.json").read_bytes() == report
    other = _elsewhere(stored, tmp_path)
    policy = TrustPolicy(keys=(trusted(key, "builds", "verdicts"),))
    done = verify_signatures(other.resolve(str(reference)), other.statements_dir(reference), policy)
    assert done.signer is not None
    assert [(one.card, one.verdict) for one in done.verdicts] == [(CARD, "checked")]


def test_publishing_the_same_again_succeeds_and_other_bytes_conflict(stored: Bench) -> None:
    first = stored.publish()
    assert stored.publish() == first
    with pytest.raises(ConflictError):
        stored.publish(stored.engine(plan=b"other"))
    assert stored.registry.resolve(str(first)).digest == first.digest


def test_rebuild_gets_the_next_version_and_is_found_first(stored: Bench) -> None:
    first = stored.publish()
    version = stored.registry.next_version("tiny", VARIANT, first.version)
    assert version == f"{first.version}.r2"
    second = stored.publish(
        stored.engine(plan=b"again"), dataclasses.replace(stored.label(), version=version)
    )
    found = [package.digest for package in stored.registry.find("tiny", VARIANT, "b" * 64)]
    assert found == [second.digest, first.digest]


def test_listing_moves_no_package(stored: Bench, tmp_path: Path) -> None:
    reference = stored.publish()
    stored.approve(reference)
    stored.enter(reference)
    other = _elsewhere(stored, tmp_path)
    (entry,) = other.entries(stored.policy)
    assert entry.reference == reference
    assert (entry.verdict, entry.size_bytes, entry.fault) == ("checked", 402, "")
    assert [pointer.channel for pointer in entry.channels] == ["candidate"]
    assert other.entry("tiny:candidate", None, stored.policy).reference == reference
    assert not (tmp_path / "other-machine" / "packages").exists()
    assert other.resolve("tiny:candidate", CARD, stored.policy).digest == reference.digest


def test_statements_are_only_ever_added(stored: Bench) -> None:
    reference = stored.publish()
    first = stored.accept(reference)
    assert stored.accept(reference) == first
    with pytest.raises(ConflictError):
        stored.accept(reference, verdict="accepted")
    gone = dataclasses.replace(reference, version="3.0")
    with pytest.raises(NotFoundError, match="publish it first"):
        stored.registry.add_statement(gone, "test", {"x.txt": b""})
    wrong = stored.report(dataclasses.replace(reference, digest="0" * 64))
    with pytest.raises(CorruptError, match="another package"):
        stored.registry.add_statement(reference, "test-2", {"report.json": wrong})


def test_statement_that_vanished_from_the_store_is_forgotten(folder: Bench) -> None:
    reference = folder.publish()
    folder.accept(reference)
    (path,) = folder.registry.store.path.glob("*/*/*.statements/*")
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    assert list(folder.registry.statements_dir(reference).iterdir()) == []


def test_changed_byte_in_the_store_is_found_and_nothing_is_kept(
    folder: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = folder.publish()
    plan = folder.registry.store.location(Place.of(reference)) / "engine" / "model.plan"
    plan.chmod(0o644)
    plan.write_bytes(b"nalp" * 100)
    other = _elsewhere(folder, tmp_path)
    with pytest.raises(CorruptError):
        other.resolve(str(reference))
    with caplog.at_level(logging.WARNING):
        assert list(other.find("tiny", VARIANT, "b" * 64)) == []
    assert "is not taken" in caplog.text
    assert list((tmp_path / "other-machine" / "packages").glob("[!.]*")) == []
    # Here the good bytes are in the cache.
    assert folder.registry.resolve(str(reference)).digest == reference.digest


def test_damaged_copy_in_the_cache_is_fetched_again(folder: Bench) -> None:
    reference = folder.publish()
    package = folder.registry.resolve(str(reference))
    plan = package.engine_dir / "model.plan"
    plan.chmod(0o644)
    plan.write_bytes(b"nalp" * 100)
    again = folder.registry.resolve(str(reference))
    assert verify(again.dir).digest == reference.digest
    assert (again.engine_dir / "model.plan").read_bytes() == b"plan" * 100


def test_manifest_of_another_place_is_corrupt(folder: Bench) -> None:
    reference = folder.publish()
    location = folder.registry.store.location(Place.of(reference))
    location.rename(location.with_name("2.0-bbbbbbbbbbbb"))
    with pytest.raises(CorruptError, match="not what its path says"):
        folder.registry.resolve("tiny:2.0-bbbbbbbbbbbb")


class _Lossy(FolderStore):
    """Stores, and gives back other bytes."""

    @contextlib.contextmanager
    def open_file(
        self, place: Place, file: FileDigest, offset: int = 0, end: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        with super().open_file(place, file, offset, end) as chunks:
            yield (chunk.replace(b"plan", b"nalp") for chunk in chunks)


def test_publish_reads_back_what_it_sent(folder: Bench, tmp_path: Path) -> None:
    registry = StoredRegistry(store=_Lossy(path=tmp_path / "lossy"), cache_dir=tmp_path / "cache")
    bench = dataclasses.replace(folder, registry=registry)
    with pytest.raises(CorruptError, match="does not read back"):
        bench.publish()
    assert not list((tmp_path / "cache").glob("packages/[!.]*"))


def test_rehearsal_is_not_published(folder: Bench) -> None:
    with folder.registry.staging() as staging:
        package = folder.seal(staging)
        manifest = {
            **package.manifest,
            "source": {**package.manifest["source"], "weights": "random"},
        }
        random = Package(dir=package.dir, manifest=manifest, digest=package.digest)
        with pytest.raises(RecipeError, match="rehearsal"):
            folder.registry.publish(random)
    assert folder.registry.entries() == []


def test_url_names_its_registry(tmp_path: Path) -> None:
    assert open_registry(str(tmp_path)) == FolderRegistry(path=tmp_path)
    assert open_registry(tmp_path.as_uri()) == FolderRegistry(path=tmp_path)
    with pytest.raises(RecipeError, match="ftp"):
        open_registry("ftp://x/y")


@pytest.mark.parametrize(
    ("name", "url"), [("s3", "s3://bucket/prefix"), ("oci", "oci://localhost:5000/engines")]
)
def test_configuration_gives_a_registry(name: str, url: str) -> None:
    config = OmegaConf.load(_CONF / f"{name}.yaml")
    config.store.url = url
    registry = instantiate(config, _convert_="all")
    assert isinstance(registry, StoredRegistry)
    assert isinstance(registry, Registry)
    assert registry.store.url == url
    assert not registry.local


def test_many_readers_of_one_package_keep_one_copy(
    folder: Bench,
    tmp_path: Path,
    in_children: Callable[[Sequence[Callable[[], object]]], list[int]],
) -> None:
    reference = folder.publish()
    folder.accept(reference)
    other = _elsewhere(folder, tmp_path)

    def read() -> None:
        assert other.resolve(str(reference)).digest == reference.digest
        assert (other.statements_dir(reference) / "test-1" / "report.json").exists()

    assert in_children([read] * 8) == [0] * 8
    assert [path.name for path in (tmp_path / "other-machine" / "packages").glob("[!.]*")] == [
        reference.digest
    ]
