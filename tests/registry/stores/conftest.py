"""Stores to run one test on each; the servers start when the first test asks for them.

What is missing on this machine fails, never skips.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.registry.stores.folder import FolderRegistry
from pipeline.registry.stores.publication import WritableStore
from pipeline.registry.stores.s3 import S3Registry
from tests.registry.stores.faulty import running
from tests.registry.stores.oci.server import FakeRegistry
from tests.registry.stores.s3_server import BUCKET, MemoryS3
from tests.services.docker_registry import RunningRegistry, running_server
from tests.services.seaweed import SeaweedServer
from tests.services.seaweed import running_server as running_s3

STORES = [
    "folder",
    "memory_s3",
    "memory_oci",
    "memory_oci_without_referrers",
    pytest.param("seaweed", marks=pytest.mark.services),
    pytest.param("docker_registry", marks=pytest.mark.services),
]


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> WritableStore:
    """An empty store of each kind."""
    found: WritableStore = request.getfixturevalue(f"{request.param}_store")
    return found


@pytest.fixture(autouse=True)
def no_gc_beside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher need not wait for collectors where there are none."""
    if "test_collecting" not in request.node.nodeid:
        monkeypatch.setattr("pipeline.registry.stores.publication.SETTLE_S", 0.0)


@pytest.fixture
def folder_store(tmp_path: Path) -> WritableStore:
    return FolderRegistry(path=tmp_path / "artifacts").store()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter deadlines, which a test can wait for; asked for before a store connects."""
    monkeypatch.setattr("pipeline.registry.stores.transfer.SILENCE_S", 0.7)
    monkeypatch.setattr("pipeline.registry.stores.transfer.ATTEMPTS", 2)
    monkeypatch.setattr("pipeline.registry.stores.transfer.WINDOW_S", 2.0)


@pytest.fixture
def memory_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryS3]:
    """A server in memory, and the environment that leads to it."""
    # boto3 waits up to a second before its first retry.
    monkeypatch.setattr(
        "botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *args: 0.01
    )
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with running(MemoryS3()) as server:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
            "AWS_ENDPOINT_URL_S3": f"http://{server.host}",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def memory_s3_store(memory_s3: MemoryS3, monkeypatch: pytest.MonkeyPatch) -> WritableStore:
    monkeypatch.setattr("pipeline.registry.stores.s3.PART_BYTES", 5 << 20)
    return S3Registry(url=f"s3://{BUCKET}/registry").store()


@pytest.fixture(scope="session")
def seaweed() -> Iterator[SeaweedServer]:
    """A real S3 server; starts once."""
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # its sockets want short paths
    with folder as path, running_s3(Path(path, "server")) as server:
        yield server


@pytest.fixture
def seaweed_store(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> WritableStore:
    for name, value in seaweed.environ.items():
        monkeypatch.setenv(name, value)
    return seaweed.store()


@pytest.fixture
def memory_oci(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeRegistry]:
    """A registry in memory, with the referrers API; no credentials, and short waits."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker-config"))
    for name in ("HOST", "USERNAME", "PASSWORD"):
        monkeypatch.delenv(f"ENGINESMITH_OCI_{name}", raising=False)
    monkeypatch.setattr("pipeline.registry.stores.oci.writing.SETTLE_S", 0.5)
    monkeypatch.setattr("pipeline.registry.stores.oci.transport.BACKOFF_S", 0.02)
    with running(FakeRegistry()) as server:
        yield server


@pytest.fixture
def memory_oci_store(memory_oci: FakeRegistry) -> WritableStore:
    return memory_oci.store()


@pytest.fixture
def memory_oci_without_referrers_store(memory_oci: FakeRegistry) -> WritableStore:
    memory_oci.native = False
    return memory_oci.store()


@pytest.fixture(scope="session")
def docker_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    """A real OCI registry; starts once."""
    with running_server(tmp_path_factory.mktemp("docker-registry")) as running:
        yield running


@pytest.fixture
def docker_registry_store(docker_registry: RunningRegistry) -> WritableStore:
    return docker_registry.store(f"engines-{os.urandom(4).hex()}")


@pytest.fixture
def age(request: pytest.FixtureRequest, store: WritableStore) -> Callable[[float], None] | None:
    """Lets everything in a store be older by so many seconds; None where no clock can be set."""
    if store.local:
        return lambda seconds: _age_folder(Path(store.url), seconds)
    if "memory_s3" in request.fixturenames or "memory_s3" in request.node.name:
        server: MemoryS3 = request.getfixturevalue("memory_s3")
        return lambda seconds: _age_objects(server, seconds)
    return None


def _age_folder(root: Path, seconds: float) -> None:
    for path in root.rglob("*"):
        then = path.lstat().st_mtime - seconds
        os.utime(path, (then, then), follow_symlinks=False)


def _age_objects(server: MemoryS3, seconds: float) -> None:
    for stored in server.objects.values():
        stored.modified_s -= seconds
    for upload in server.uploads.values():
        upload.begun_s -= seconds
