from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.formats.trtllm.containers.image import build_image
from tests.services.dockerd import dockerd

if TYPE_CHECKING:
    from docker import DockerClient

__all__ = ["dockerd"]  # a fixture


@pytest.fixture(scope="session")
def engine(dockerd: str) -> Iterator[DockerClient]:
    """The tests' own client of an engine that holds the tests' image."""
    import docker

    client = docker.DockerClient(dockerd)
    build_image(client)
    yield client
    client.close()


@pytest.fixture
def client(
    engine: DockerClient, dockerd: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DockerClient]:
    """The engine that the code under test finds; no test may leave a container in it."""
    monkeypatch.setenv("DOCKER_HOST", dockerd)
    yield engine
    left = [(container.name, container.status) for container in engine.containers.list(all=True)]
    for name, _ in left:
        engine.api.remove_container(name, force=True)
    assert not left


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may write to; pytest's own are for one user only."""
    folder = Path(tempfile.mkdtemp(prefix="shared-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)
