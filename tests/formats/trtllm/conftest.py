"""An engine as on a machine with a GPU, and the image with the fake `trtllm-build` in it.

The engine finds a hook of NVIDIA's toolkit on its PATH and calls it for `--gpus`; the hook of these
tests does nothing. So the GPU request itself is real.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.formats.trtllm.convert.checkpoints import Converted, convert, unified_checkpoint
from tests.formats.trtllm.fakes import fake_card, write_script
from tests.formats.trtllm.python_image import build_python_image
from tests.runners.trtllm.engines import PACKAGES
from tests.services.dockerd import running_dockerd

if TYPE_CHECKING:
    from docker import DockerClient


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What NVIDIA's toolkit puts on the PATH."""
    folder = tmp_path_factory.mktemp("programs")
    write_script(folder / "nvidia-container-runtime-hook", "#!/bin/sh\ncat > /dev/null\n")
    return folder


@pytest.fixture(scope="session")
def engine_host(programs: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        with running_dockerd() as host:
            yield host


@pytest.fixture(scope="session")
def engine(engine_host: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerClient]:
    """The tests' own client of an engine that holds the image."""
    import docker

    client = docker.DockerClient(engine_host)
    build_python_image(client, tmp_path_factory.mktemp("image"), PACKAGES)
    yield client
    client.close()


@pytest.fixture
def client(
    engine: DockerClient, engine_host: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DockerClient]:
    """The engine that the code under test finds; no test may leave a container in it."""
    monkeypatch.setenv("DOCKER_HOST", engine_host)
    yield engine
    left = [(container.name, container.status) for container in engine.containers.list(all=True)]
    for name, _ in left:
        engine.api.remove_container(name, force=True)
    assert not left


@pytest.fixture
def hook(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process sees the engine's programs, too, and a card; no `trtllm-build`."""
    fake_card(monkeypatch)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder of ours that a container sees, below one that every user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="shared-"))
    yield folder
    shutil.rmtree(folder)


Convert = Callable[[str], Converted]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Converts a tiny architecture, with an FP8 cache, once a session."""

    @cache
    def make(name: str) -> Converted:
        root = tmp_path_factory.mktemp(name)
        return convert(unified_checkpoint(root, name), root / "converted")

    return make


@pytest.fixture(scope="session")
def llama(converted: Convert) -> Path:
    """The unified checkpoint of the tiny Llama."""
    return converted("llama").unified
