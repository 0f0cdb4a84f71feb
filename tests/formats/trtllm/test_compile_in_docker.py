"""The same build in a container of a real Docker engine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.core.cache import StageCache
from pipeline.core.errors import PipelineError, ToolError
from pipeline.core.values import Checkpoint, Engine
from pipeline.formats.trtllm.compiler import TrtLlmCompiler
from tests.formats.trtllm.fakes import card_machine
from tests.formats.trtllm.python_image import IMAGE, misbehaving_image
from tests.formats.trtllm.settings import compiler
from tests.quant.tiny_quantized import ADA, tiny_checkpoint

if TYPE_CHECKING:
    from docker import DockerClient

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("client", "hook")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def build(checkpoint: Checkpoint, shared: Path, built: TrtLlmCompiler | None = None) -> Engine:
    cache = StageCache(root=shared / "cache")
    return (built or compiler()).compile(checkpoint, ADA, cache, shared / "logs")


def test_engine_comes_out_of_the_container_and_belongs_to_the_caller(
    client: DockerClient, checkpoint: Checkpoint, shared: Path
) -> None:
    engine = build(checkpoint, shared)
    for path in engine.dir.iterdir():
        assert path.stat().st_uid == os.getuid()
    config = json.loads((engine.dir / "config.json").read_text())
    assert config["version"] == "1.2.1"
    assert "/mnt" not in (engine.dir / "config.json").read_text()
    record = engine.checks["trtllm_build"]["environment"]
    assert record["image"] == client.images.get(IMAGE).id
    assert record["tensorrt"] == "10.14.1.48"
    assert engine.tools["build-image"] == record["image"]
    log = (shared / "logs" / "compile.log").read_text()
    assert "--checkpoint_dir', '/mnt/checkpoint'" in log
    assert "HOME=/home/enginesmith" in log


def test_local_and_container_builds_give_the_same_engine_folder(
    checkpoint: Checkpoint, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contained = build(checkpoint, shared)
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
    client: DockerClient, checkpoint: Checkpoint, shared: Path, behaviour: str, message: str
) -> None:
    image = misbehaving_image(client, behaviour)
    with pytest.raises(PipelineError, match=message):
        build(checkpoint, shared, compiler(image=image))
    assert list((shared / "cache" / "stages" / "compile-trtllm").iterdir()) == []


def test_build_that_hits_the_memory_limit_names_the_setting(
    client: DockerClient, checkpoint: Checkpoint, shared: Path
) -> None:
    image = misbehaving_image(client, "oom")
    with pytest.raises(ToolError, match=r"compiler\.memory_gib") as caught:
        build(checkpoint, shared, compiler(image=image, memory_gib=0.125))
    assert caught.value.returncode == 137
    assert list((shared / "cache" / "stages" / "compile-trtllm").iterdir()) == []
