"""S3 servers: a real one for the session, and a small one in memory that fails when asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.values import FileDigest, Package
from pipeline.registry.client.download import files_of
from pipeline.registry.stores.s3 import S3Store
from tests.registry.stores.s3_packages import SIGNATURES, sealed
from tests.registry.stores.s3_server import BUCKET, MemoryS3, running_s3
from tests.services.seaweed import SeaweedServer, session_server

MakeStore = Callable[..., S3Store]


@pytest.fixture(scope="session")
def seaweed() -> Iterator[SeaweedServer]:
    """A real S3 server; starts once."""
    with session_server() as server:
        yield server


@pytest.fixture
def s3(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> MakeStore:
    """Makes stores on the real server."""
    for name, value in seaweed.environ.items():
        monkeypatch.setenv(name, value)
    return seaweed.store


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryS3]:
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
        }.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def store(memory: MemoryS3) -> S3Store:
    """A store on the server in memory."""
    return S3Store(url=f"s3://{BUCKET}/registry", part_bytes=5 << 20)


@pytest.fixture(params=["memory", pytest.param("seaweed", marks=pytest.mark.services)])
def any_store(request: pytest.FixtureRequest) -> S3Store:
    """A store on the server in memory, and one on the real server."""
    if request.param == "memory":
        found: S3Store = request.getfixturevalue("store")
        return found
    make: MakeStore = request.getfixturevalue("s3")
    return make(part_bytes=5 << 20)


@pytest.fixture
def package(bench: Any, tmp_path: Path) -> Package:
    """A sealed package with a file of several parts."""
    return sealed(bench, tmp_path / "package")


@pytest.fixture
def published(store: S3Store, package: Package) -> FileDigest:
    """The large file of a published package."""
    store.put_package(package, SIGNATURES)
    return max(files_of(package.manifest), key=lambda file: file.size_bytes)
