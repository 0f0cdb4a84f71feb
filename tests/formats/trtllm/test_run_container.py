"""Programs, and the whole build, in containers of a real Docker engine."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.core.cache import StageCache
from pipeline.core.errors import IncompatibleError, PipelineError, ToolError
from pipeline.core.values import Checkpoint, Engine
from pipeline.formats.trtllm.compiler import TrtLlmCompiler
from pipeline.formats.trtllm.place import Shared, ToolHost
from tests.formats.trtllm.fakes import card_machine, compiler
from tests.formats.trtllm.python_image import IMAGE, misbehaving_image
from tests.quant.tiny_quantized import ADA, tiny_checkpoint
from tests.runners.trtllm.engines import RUNNER

if TYPE_CHECKING:
    from docker import DockerClient

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("client")]


OTHER_UID = 12345


def output_of(
    script: str,
    log_path: Path,
    *shared: Shared,
    timeout_s: float = 60.0,
    image: str = IMAGE,
    memory_bytes: int | None = None,
) -> list[str]:
    """What a shell script prints in a container."""
    place = ToolHost(gpu=None, image=image, memory_bytes=memory_bytes)
    command = ("sh", "-c", script)
    place.run(command, shared, stage="compile", log_path=log_path, timeout_s=timeout_s)
    return log_path.read_text().splitlines()[1:]


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def child(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another Python that runs a container, once that is at work; see `tmp_path / "log"`."""
    module, log = output_of.__module__, tmp_path / "log"
    code = f"from pathlib import Path; from {module} import output_of\n"
    code += f"output_of('echo at work; sleep 600', Path({str(log)!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: log.exists() and "\nat work" in log.read_text())
    yield process
    process.kill()
    process.communicate()


def test_command_line_and_both_streams_are_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "compile.log"
    assert sorted(output_of("echo one; echo two >&2", log)) == ["one", "two"]
    assert f"'{IMAGE}', 'sh', '-c'" in log.read_text().splitlines()[0]


def test_failure_carries_exit_code_log_and_last_lines(tmp_path: Path) -> None:
    with pytest.raises(ToolError) as caught:
        output_of("echo '[E] the cause'; exit 3", tmp_path / "log")
    assert caught.value.returncode == 3
    assert f"exited 3; its log is {tmp_path}/log" in str(caught.value)
    assert str(caught.value).endswith("    [E] the cause")


@pytest.mark.parametrize("signals", ["", "trap '' TERM;"])
def test_timeout_stops_also_a_tool_that_ignores_sigterm(tmp_path: Path, signals: str) -> None:
    with pytest.raises(ToolError, match="it was stopped after 2 s"):
        output_of(f"{signals} while :; do sleep 1; done", tmp_path / "log", timeout_s=2.0)


@pytest.mark.parametrize(
    ("script", "returncode"), [("exec tail /dev/zero", 137), ("tail /dev/zero; echo on", 0)]
)
def test_memory_limit_fails_the_run_whatever_the_exit_code(
    tmp_path: Path, script: str, returncode: int
) -> None:
    with pytest.raises(ToolError, match="killed at its memory limit") as caught:
        output_of(script, tmp_path / "log", memory_bytes=64_000_000)
    assert caught.value.returncode == returncode


def test_ctrl_c_removes_the_container(client: DockerClient, child: subprocess.Popen[str]) -> None:
    wait_for(client.containers.list)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert "KeyboardInterrupt" in stderr
    assert client.containers.list(all=True) == []


def test_what_a_killed_process_left_is_removed_by_the_next_run_and_nothing_else(
    tmp_path: Path, client: DockerClient, child: subprocess.Popen[str]
) -> None:
    output_of("true", tmp_path / "beside.log")
    assert len(client.containers.list()) == 1
    child.kill()
    child.wait()
    assert len(client.containers.list()) == 1
    output_of("true", tmp_path / "next.log")
    assert client.containers.list(all=True) == []


def test_full_disk_below_the_log_ends_the_run(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        with pytest.raises(PipelineError):
            output_of("yes", disk / "log")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_missing_bind_source_is_refused_and_not_made(tmp_path: Path) -> None:
    source = tmp_path / "nowhere"
    with pytest.raises(IncompatibleError, match="if the folder exists here"):
        output_of("true", tmp_path / "log", Shared(name="x", source=source))
    assert not source.exists()


def test_missing_image_is_never_pulled(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"get it: make image.*registry\.invalid/no:1"):
        output_of("true", tmp_path / "log", image="registry.invalid/no:1")


def test_read_only_bind_cannot_be_written_whatever_its_name(tmp_path: Path) -> None:
    folder = tmp_path / 'a, "b"'
    folder.mkdir()
    script = "touch /mnt/data/new 2>/dev/null || echo refused"
    shared = Shared(name="data", source=folder)
    assert output_of(script, tmp_path / "log", shared) == ["refused"]
    assert list(folder.iterdir()) == []


def test_there_is_no_network(tmp_path: Path) -> None:
    lines = output_of("tail -n +2 /proc/net/route; ip -o link", tmp_path / "log")
    assert all("LOOPBACK" in line or ",UP" not in line for line in lines)


def test_what_is_written_belongs_to_the_caller(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.chmod(0o777)
    monkeypatch.setattr(os, "getuid", lambda: OTHER_UID)
    monkeypatch.setattr(os, "getgid", lambda: OTHER_UID)
    writable = Shared(name="engine", source=shared, read_only=False)
    output_of("touch /mnt/engine/file", shared / "log", writable)
    written = (shared / "file").stat()
    assert (written.st_uid, written.st_gid) == (OTHER_UID, OTHER_UID)


def test_home_env_and_shared_memory_are_as_asked(tmp_path: Path) -> None:
    """HOME is private, writable, and may hold programs."""
    script = 'cp /bin/busybox "$HOME/echo" && "$HOME/echo" "$USER in $HOME"'
    script += '; echo "$HF_HUB_OFFLINE"; df -m /dev/shm | tail -n 1'
    *lines, memory = output_of(script, tmp_path / "log")
    assert lines == ["enginesmith in /home/enginesmith", "1"]
    assert memory.split()[1] == "1024"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def build(checkpoint: Checkpoint, shared: Path, built: TrtLlmCompiler | None = None) -> Engine:
    cache = StageCache(root=shared / "cache")
    return (built or compiler()).compile(checkpoint, ADA, cache, shared / "logs")


@pytest.mark.usefixtures("hook")
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


@pytest.mark.usefixtures("hook")
def test_local_and_container_builds_give_the_same_engine_folder(
    checkpoint: Checkpoint, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contained = build(checkpoint, shared)
    card_machine(tmp_path / "machine", monkeypatch)
    local = build(checkpoint, tmp_path)
    assert local.digest == contained.digest
    assert local.dir != contained.dir


@pytest.mark.usefixtures("hook")
def test_build_that_hits_the_memory_limit_names_the_setting(
    client: DockerClient, checkpoint: Checkpoint, shared: Path
) -> None:
    image = misbehaving_image(client, "oom")
    with pytest.raises(ToolError, match=r"compiler\.memory_gib") as caught:
        build(checkpoint, shared, compiler(image=image, memory_gib=0.125))
    assert caught.value.returncode == 137
    assert list((shared / "cache" / "stages" / "compile-trtllm").iterdir()) == []


@pytest.mark.usefixtures("hook")
def test_session_answers_from_a_container_that_is_gone_whatever_ends_it(
    client: DockerClient, checkpoint: Checkpoint, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(shared))  # logs of what fails stay there
    engine = build(checkpoint, shared)
    runner = dataclasses.replace(RUNNER, where="docker", image=IMAGE)
    assert runner.why_not(engine) is None
    with runner.open(engine) as session:
        assert len(client.containers.list()) == 1
        assert session.logits([1, 2, 3]).shape == (3, 320)
        assert session.generate([[1], [2]], 3).tokens.shape == (2, 3)
        assert len(list(session.stream([1], 5, frozenset()))) == 5
    assert client.containers.list(all=True) == []
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), runner.open(engine):
        raise ZeroDivisionError
    assert time.monotonic() - began < 60
    assert client.containers.list(all=True) == []
    with runner.open(engine) as session:
        (container,) = client.containers.list()
        container.kill()
        with pytest.raises(PipelineError):
            session.logits([1])
    assert client.containers.list(all=True) == []
