"""The same session with the engine held by a container of a real Docker engine."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.core.cache import StageCache
from pipeline.core.errors import PipelineError
from pipeline.core.values import Engine
from tests.formats.trtllm.fakes import compiler, fake_card, write_script
from tests.formats.trtllm.python_image import IMAGE, build_python_image
from tests.quant.tiny_quantized import ADA, tiny_checkpoint
from tests.runners.trtllm import engines
from tests.services.dockerd import running_dockerd

if TYPE_CHECKING:
    from docker import DockerClient

pytestmark = pytest.mark.services

RUNNER = dataclasses.replace(engines.RUNNER, where="docker", image=IMAGE)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerClient]:
    """An engine with a GPU hook that does nothing; this machine's PATH has its program too."""
    import docker

    programs = tmp_path_factory.mktemp("programs")
    write_script(programs / "nvidia-container-runtime-hook", "#!/bin/sh\ncat > /dev/null\n")
    with pytest.MonkeyPatch.context() as patch:
        fake_card(patch)
        patch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        with running_dockerd() as host:
            patch.setenv("DOCKER_HOST", host)
            client = docker.DockerClient(host)
            build_python_image(client, tmp_path_factory.mktemp("image"), engines.PACKAGES)
            yield client
            client.close()


@pytest.fixture(scope="module")
def engine(client: DockerClient) -> Iterator[Engine]:
    folder = Path(tempfile.mkdtemp(prefix="session-"))
    folder.chmod(0o755)
    checkpoint = tiny_checkpoint(folder / "checkpoint")
    cache = StageCache(root=folder / "cache")
    yield compiler().compile(checkpoint, ADA, cache, folder / "logs")
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs of what fails stay in a folder that pytest removes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_container_answers_and_is_gone_afterwards(client: DockerClient, engine: Engine) -> None:
    assert RUNNER.why_not(engine) is None
    with RUNNER.open(engine) as session:
        assert len(client.containers.list()) == 1
        assert session.logits([1, 2, 3]).shape == (3, 320)
        assert session.generate([[1], [2]], 3).tokens.shape == (2, 3)
        assert len(list(session.stream([1], 5, frozenset()))) == 5
    assert client.containers.list(all=True) == []


def test_container_is_removed_when_the_caller_fails(client: DockerClient, engine: Engine) -> None:
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError), RUNNER.open(engine):
        raise ZeroDivisionError
    assert client.containers.list(all=True) == []
    assert time.monotonic() - started < 60


def test_container_that_is_killed_ends_the_wait(client: DockerClient, engine: Engine) -> None:
    with RUNNER.open(engine) as session:
        (container,) = client.containers.list()
        container.kill()
        with pytest.raises(PipelineError):
            session.logits([1])
    assert client.containers.list(all=True) == []
