"""The same build in a container of a real Docker engine.

The engine finds a hook of NVIDIA's toolkit on its PATH, as on a machine with a GPU, and calls it
for `--gpus`; the hook of these tests does nothing. So the GPU request itself is real.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.core.cache import StageCache
from pipeline.core.errors import PipelineError, ToolError
from pipeline.core.values import Checkpoint, Engine
from pipeline.formats.trtllm.compiler import TrtLlmCompiler
from tests.formats.trtllm.fakes import fake_card, write_script
from tests.formats.trtllm.python_image import IMAGE, build_python_image, misbehaving_image
from tests.formats.trtllm.settings import compiler
from tests.quant.tiny_quantized import ADA, tiny_checkpoint
from tests.services.dockerd import running_dockerd

if TYPE_CHECKING:
    from docker import DockerClient

pytestmark = pytest.mark.services

HOOK = "nvidia-container-runtime-hook"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a machine with a card and NVIDIA's toolkit has on its PATH; no `trtllm-build`."""
    folder = tmp_path_factory.mktemp("programs")
    write_script(folder / HOOK, "#!/bin/sh\ncat > /dev/null\n")
    return folder


@pytest.fixture(scope="module")
def engine_host(programs: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        fake_card(patch)
        patch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        with running_dockerd() as host:
            yield host


@pytest.fixture(scope="module")
def client(engine_host: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerClient]:
    import docker

    client = docker.DockerClient(engine_host)
    build_python_image(client, tmp_path_factory.mktemp("image"))
    yield client
    client.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(autouse=True)
def machine(
    client: DockerClient, engine_host: str, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_HOST", engine_host)
    yield
    assert client.containers.list(all=True) == []


@pytest.fixture
def folder() -> Iterator[Path]:
    """A cache that a container may enter whoever runs it."""
    work = Path(tempfile.mkdtemp(prefix="compile-"))
    work.chmod(0o755)
    yield work
    shutil.rmtree(work)


def build(checkpoint: Checkpoint, folder: Path, built: TrtLlmCompiler | None = None) -> Engine:
    cache = StageCache(root=folder / "cache")
    return (built or compiler()).compile(checkpoint, ADA, cache, folder / "logs")


def test_engine_comes_out_of_the_container_and_belongs_to_the_caller(
    client: DockerClient, checkpoint: Checkpoint, folder: Path
) -> None:
    engine = build(checkpoint, folder)
    for path in engine.dir.iterdir():
        assert path.stat().st_uid == os.getuid()
    config = json.loads((engine.dir / "config.json").read_text())
    assert config["version"] == "1.2.1"
    assert "/mnt" not in (engine.dir / "config.json").read_text()
    record = engine.checks["trtllm_build"]["environment"]
    assert record["image"] == client.images.get(IMAGE).id
    assert record["tensorrt"] == "10.14.1.48"
    assert engine.tools["build-image"] == record["image"]
    log = (folder / "logs" / "compile.log").read_text()
    assert "--checkpoint_dir', '/mnt/checkpoint'" in log
    assert "HOME=/home/enginesmith" in log


def test_local_and_container_builds_give_the_same_engine_folder(
    checkpoint: Checkpoint, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.formats.trtllm.fakes import card_machine

    contained = build(checkpoint, folder)
    card_machine(tmp_path / "machine", monkeypatch)
    local = build(checkpoint, tmp_path)
    assert local.digest == contained.digest
    assert local.dir != contained.dir


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("say:[TRT] [E] Error Code 2: OutOfMemory", "lower compiler.max_num_tokens"),
        ("set:build_config.max_seq_len=64", "max_seq_len: asked 128, got 64"),
    ],
)
def test_failure_in_the_container_leaves_no_engine(
    client: DockerClient, checkpoint: Checkpoint, folder: Path, behaviour: str, message: str
) -> None:
    image = misbehaving_image(client, behaviour)
    with pytest.raises(PipelineError, match=message):
        build(checkpoint, folder, compiler(image=image))
    assert list((folder / "cache" / "stages" / "compile-trtllm").iterdir()) == []


def test_build_that_hits_the_memory_limit_names_the_setting(
    client: DockerClient, checkpoint: Checkpoint, folder: Path
) -> None:
    image = misbehaving_image(client, "oom")
    with pytest.raises(ToolError, match=r"compiler\.memory_gib") as caught:
        build(checkpoint, folder, compiler(image=image, memory_gib=0.125))
    assert caught.value.returncode == 137
    assert list((folder / "cache" / "stages" / "compile-trtllm").iterdir()) == []
