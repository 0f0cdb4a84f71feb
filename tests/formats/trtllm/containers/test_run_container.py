from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.core.errors import IncompatibleError, PipelineError, ToolError
from pipeline.formats.trtllm.container import (
    OWNER_LABEL,
    Container,
    Shared,
    owner_of,
    run_container,
)
from tests.formats.trtllm.containers.image import IMAGE, build_image
from tests.services.dockerd import running_dockerd

if TYPE_CHECKING:
    from docker import DockerClient

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("client")]

MB = 1_000_000
OTHER_UID = 12345


def tool(folder: Path, behaviour: str = "build", **settings: Any) -> Container:
    """The stand-in for trtllm-build, with a checkpoint and an output folder below `folder`."""
    (folder / "checkpoint").mkdir()
    (folder / "engine").mkdir()
    (folder / "checkpoint" / "behaviour").write_text(f"{behaviour}\n")
    return Container(
        image=IMAGE,
        command=(
            "trtllm-build",
            "--checkpoint_dir",
            "/mnt/checkpoint",
            "--output_dir",
            "/mnt/engine",
        ),
        shared=(
            Shared(name="checkpoint", source=folder / "checkpoint"),
            Shared(name="engine", source=folder / "engine", read_only=False),
        ),
        **settings,
    )


def output_of(script: str, log_path: Path, **settings: Any) -> list[str]:
    """What a shell script prints in a container."""
    run_container(
        Container(image=IMAGE, command=("sh", "-c", script), **settings),
        stage="s",
        log_path=log_path,
    )
    return log_path.read_text().splitlines()[1:]


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def logged(log_path: Path, text: str) -> bool:
    return log_path.exists() and text in log_path.read_text()


class Running:
    """`run_container` on a thread; `end()` waits for it and gives what it raised."""

    def __init__(self, container: Container, log_path: Path, **settings: Any) -> None:
        self.fault: BaseException | None = None
        self._arguments = {"stage": "compile", "log_path": log_path, **settings}
        self._container = container
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            run_container(self._container, **self._arguments)
        except BaseException as error:
            self.fault = error

    def end(self) -> BaseException | None:
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()
        return self.fault


@pytest.fixture
def child(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another Python that runs the tool, once the tool is at work; see `tmp_path / "log"`."""
    tool(tmp_path, "hang")
    code = f"""
from pathlib import Path
from tests.formats.trtllm.containers.image import IMAGE
from pipeline.formats.trtllm.container import Container, Shared, run_container
folder = Path({str(tmp_path)!r})
run_container(
    Container(
        image=IMAGE,
        command=("trtllm-build", "--checkpoint_dir", "/mnt/checkpoint"),
        shared=(Shared(name="checkpoint", source=folder / "checkpoint"),),
    ),
    stage="compile",
    log_path=folder / "log",
)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[4],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: logged(tmp_path / "log", "hanging"))
    yield process
    process.kill()
    process.communicate()


def test_command_line_and_both_streams_are_in_the_log(tmp_path: Path) -> None:
    run_container(tool(tmp_path), stage="compile", log_path=tmp_path / "logs" / "compile.log")
    first, *rest = (tmp_path / "logs" / "compile.log").read_text().splitlines()
    assert f"'{IMAGE}', 'trtllm-build', '--checkpoint_dir'" in first
    assert sorted(rest) == ["[I] Building", "[W] on stderr"]
    assert (tmp_path / "engine" / "rank0.engine").read_text() == "plan\n"


def test_failure_carries_exit_code_log_and_last_lines(tmp_path: Path) -> None:
    with pytest.raises(ToolError) as caught:
        run_container(tool(tmp_path, "fail"), stage="compile", log_path=tmp_path / "log")
    assert caught.value.returncode == 3
    assert f"exited 3; its log is {tmp_path}/log" in str(caught.value)
    assert str(caught.value).endswith("    [E] the cause")


@pytest.mark.parametrize("behaviour", ["hang", "hang-deaf"])
def test_timeout_stops_also_a_tool_that_ignores_sigterm(tmp_path: Path, behaviour: str) -> None:
    with pytest.raises(ToolError, match="it was stopped after 2 s") as caught:
        run_container(
            tool(tmp_path, behaviour), stage="compile", log_path=tmp_path / "log", timeout_s=2.0
        )
    assert "    hanging" in str(caught.value)


@pytest.mark.parametrize(("behaviour", "returncode"), [("memory", 137), ("memory-child", 0)])
def test_memory_limit_fails_the_run_whatever_the_exit_code(
    tmp_path: Path, behaviour: str, returncode: int
) -> None:
    with pytest.raises(ToolError, match="killed at its memory limit") as caught:
        run_container(
            tool(tmp_path, behaviour, memory_bytes=64 * MB),
            stage="compile",
            log_path=tmp_path / "log",
        )
    assert caught.value.returncode == returncode


def test_ctrl_c_removes_the_container(
    tmp_path: Path, client: DockerClient, child: subprocess.Popen[str]
) -> None:
    assert len(client.containers.list()) == 1
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=20)
    assert "KeyboardInterrupt" in stderr
    assert client.containers.list(all=True) == []


def test_what_a_killed_process_left_is_removed_by_the_next_run(
    tmp_path: Path,
    client: DockerClient,
    child: subprocess.Popen[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    child.kill()
    child.wait()
    (left,) = client.containers.list()
    output_of("true", tmp_path / "next.log")
    assert client.containers.list(all=True) == []
    assert f"Removing {left.name}" in caplog.text


def test_container_of_a_living_process_is_left_alone(
    tmp_path: Path, client: DockerClient, child: subprocess.Popen[str]
) -> None:
    (other,) = client.containers.list()
    assert other.labels[OWNER_LABEL] == owner_of(child.pid)
    output_of("true", tmp_path / "next.log")
    assert [container.name for container in client.containers.list()] == [other.name]
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=20)


def test_engine_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import docker

    with running_dockerd() as host:
        monkeypatch.setenv("DOCKER_HOST", host)
        own = docker.DockerClient(host)
        build_image(own)
        own.close()
        running = Running(tool(tmp_path, "hang"), tmp_path / "log")
        wait_for(lambda: logged(tmp_path / "log", "hanging"))
        pid_file = Path(host.removeprefix("unix://")).with_name("dockerd.pid")
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
        fault = running.end()
    assert isinstance(fault, PipelineError)
    assert "Docker" in str(fault)


def test_without_gpu_runtime_the_way_on_is_named_and_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="nvidia-ctk runtime configure"):
        run_container(tool(tmp_path, gpus=True), stage="compile", log_path=tmp_path / "log")


def test_missing_bind_source_is_refused_and_not_made(tmp_path: Path) -> None:
    source = tmp_path / "nowhere"
    with pytest.raises(IncompatibleError, match="if the folder exists here"):
        output_of("true", tmp_path / "log", shared=(Shared(name="x", source=source),))
    assert not source.exists()


def test_missing_image_is_never_pulled(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"get it: make image.*nvcr\.io/nvidia/no:1"):
        run_container(
            Container(image="nvcr.io/nvidia/no:1", command=("true",)),
            stage="compile",
            log_path=tmp_path / "log",
        )


def test_read_only_bind_cannot_be_written(tmp_path: Path) -> None:
    shared = Shared(name="data", source=tmp_path)
    script = "touch /mnt/data/new 2>/dev/null || echo refused"
    assert output_of(script, tmp_path / "log", shared=(shared,)) == ["refused"]
    assert not (tmp_path / "new").exists()


def test_there_is_no_network(tmp_path: Path) -> None:
    lines = output_of("tail -n +2 /proc/net/route; ip -o link", tmp_path / "log")
    assert all("LOOPBACK" in line or ",UP" not in line for line in lines)


def test_full_disk_below_the_log_ends_the_run(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        with pytest.raises(PipelineError):
            run_container(tool(tmp_path, "endless"), stage="s", log_path=disk / "log", timeout_s=60)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_is_written_belongs_to_the_caller(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = tool(shared)
    (shared / "engine").chmod(0o777)
    monkeypatch.setattr(os, "getuid", lambda: OTHER_UID)
    monkeypatch.setattr(os, "getgid", lambda: OTHER_UID)
    run_container(container, stage="compile", log_path=shared / "log")
    written = [path.stat() for path in (shared / "engine").rglob("*")]
    assert len(written) == 4
    assert {(stat.st_uid, stat.st_gid) for stat in written} == {(OTHER_UID, OTHER_UID)}


def test_home_is_private_writable_and_may_hold_programs(tmp_path: Path) -> None:
    script = 'cp /bin/busybox "$HOME/echo" && "$HOME/echo" "$USER in $HOME"'
    assert output_of(script, tmp_path / "log") == ["enginesmith in /home/enginesmith"]


def test_env_and_shared_memory_are_as_asked(tmp_path: Path) -> None:
    lines = output_of(
        'echo "$ADDED"; df -m /dev/shm | tail -n 1',
        tmp_path / "log",
        env={"ADDED": "yes"},
        shm_bytes=200 << 20,
    )
    assert lines[0] == "yes"
    assert lines[1].split()[1] == "200"
