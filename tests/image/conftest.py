"""One engine for all images, and one stand-in for their bases, which takes half a minute."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.image.base import copy_checkout, download_client_wheels, make_debian
from tests.image.client_image import NAME, Docker, make_image
from tests.registry.backends import Backends
from tests.registry.client.conftest import Shop
from tests.services.dockerd import dockerd

if TYPE_CHECKING:
    from docker import DockerClient

__all__ = ["dockerd"]  # a fixture


@pytest.fixture(scope="session")
def client(dockerd: str) -> Iterator[DockerClient]:
    import docker

    client = docker.DockerClient(dockerd, timeout=300)
    yield client
    client.close()


@pytest.fixture(scope="session")
def debian(client: DockerClient) -> Iterator[str]:
    """Debian with Python and pip, by its name in the engine."""
    with tempfile.TemporaryDirectory(prefix="debian-") as folder:
        yield make_debian(client, Path(folder))


@pytest.fixture(scope="session")
def servers() -> Iterator[Backends]:
    """Real registries on loopback; each starts when it is asked for."""
    with Backends() as started:
        yield started


@pytest.fixture(scope="session")
def client_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's files and wheels, for a build of the pull image without network."""
    folder = tmp_path_factory.mktemp("client") / "context"
    copy_checkout(folder, "Dockerfile.client", "requirements.lock")
    lock = folder / "requirements.lock"
    download_client_wheels(folder / "pyproject.toml", lock, folder / "wheels")
    return folder


@pytest.fixture(scope="session")
def docker(dockerd: str, debian: str, client_context: Path) -> Docker:
    """An engine that has the pull image."""
    made = make_image(dockerd, client_context, debian, NAME)
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    return Docker(host=dockerd)


@pytest.fixture
def shop_of(
    servers: Backends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Shop]:
    """A registry with signed packages, on a backend."""

    def make(backend: str) -> Shop:
        (tmp_path / "home").mkdir(exist_ok=True)
        for name, value in servers.environ(backend).items():
            monkeypatch.setenv(name, value)
        return Shop(store=servers.store(backend, tmp_path / "registry"), home=tmp_path / "home")

    return make
