"""Stores to run one test on each; the servers start when the first test asks for them.

What is missing on this machine fails, never skips.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.registry.store import WritableStore
from pipeline.registry.stores.folder import FolderRegistry
from pipeline.registry.stores.s3 import S3Registry
from tests.registry.stores.s3_server import BUCKET, MemoryS3, running_s3
from tests.services.seaweed import SeaweedServer, session_server

STORES = ["folder", "memory_s3", pytest.param("seaweed", marks=pytest.mark.services)]


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> WritableStore:
    """An empty store of each kind."""
    found: WritableStore = request.getfixturevalue(f"{request.param}_store")
    return found


@pytest.fixture
def folder_store(tmp_path: Path) -> WritableStore:
    return FolderRegistry(path=tmp_path / "artifacts").store()


@pytest.fixture
def memory_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryS3]:
    """A server in memory, and the environment that leads to it."""
    # boto3 waits up to a second before its first retry.
    monkeypatch.setattr(
        "botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *args: 0.01
    )
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with running_s3() as server:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
            "AWS_ENDPOINT_URL_S3": server.url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def memory_s3_store(memory_s3: MemoryS3) -> WritableStore:
    return S3Registry(url=f"s3://{BUCKET}/registry", part_bytes=5 << 20).store()


@pytest.fixture(scope="session")
def seaweed() -> Iterator[SeaweedServer]:
    """A real S3 server; starts once."""
    with session_server() as server:
        yield server


@pytest.fixture
def seaweed_store(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> WritableStore:
    for name, value in seaweed.environ.items():
        monkeypatch.setenv(name, value)
    return seaweed.store(part_bytes=5 << 20)


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
