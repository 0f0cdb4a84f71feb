from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.core.errors import IncompatibleError
from pipeline.core.gpu import Gpu
from pipeline.formats.trtllm.place import (
    is_stale,
    owner_of,
    preflight,
    require_driver,
    require_gpu_runtime,
)
from tests.formats.trtllm.python_image import IMAGE

if TYPE_CHECKING:
    from docker import DockerClient


CARD = Gpu(
    name="NVIDIA GeForce RTX 4090",
    sm=89,
    driver="580.65.06",
    uuid="GPU-1",
)


@pytest.mark.parametrize("driver", ["579.99", "535.1", "[N/A]"])
def test_driver_too_old_for_the_image_is_refused(driver: str) -> None:
    require_driver(CARD)
    with pytest.raises(IncompatibleError) as caught:
        require_driver(dataclasses.replace(CARD, driver=driver))
    assert f"RTX 4090: driver {driver} is too old for CUDA 13.1, which needs 580" in str(
        caught.value
    )


def cdi(device: str) -> dict[str, object]:
    return {"Runtimes": {"runc": {}}, "DiscoveredDevices": [{"Source": "cdi", "ID": device}]}


@pytest.mark.parametrize(
    "info", [{"Runtimes": {"runc": {}, "nvidia": {}}}, cdi("nvidia.com/gpu=0")]
)
def test_gpu_runtime_is_the_runtime_or_a_cdi_device(
    info: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    require_gpu_runtime(info)


@pytest.mark.parametrize("info", [{}, cdi("amd.com/gpu=0")])
def test_no_gpu_runtime_is_refused(
    info: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(IncompatibleError, match="install the NVIDIA Container Toolkit"):
        require_gpu_runtime(info)


def run_as(uid: int, groups: list[int], function: Callable[[], object]) -> str:
    """Call `function` in a child process of this uid and gid; what it raised, empty for nothing."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        message = ""
        try:
            os.setgroups(groups)
            os.setgid(uid)
            os.setuid(uid)
            function()
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, message.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        message = stream.read()
    os.waitpid(child, 0)
    return message


@pytest.mark.services
@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("tcp://127.0.0.1:2375", "remote engine does not see this machine's folders"),
        ("unix:///nowhere/docker.sock", "no Docker engine here: install one"),
    ],
)
def test_engine_that_is_remote_or_missing_is_refused(
    host: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", host)
    with pytest.raises(IncompatibleError, match=message):
        preflight(IMAGE, CARD)


@pytest.mark.services
@pytest.mark.usefixtures("hook")
def test_image_that_was_built_here_is_known_by_its_id(client: DockerClient) -> None:
    assert preflight(IMAGE, CARD) == client.images.get(IMAGE).id
    with pytest.raises(IncompatibleError, match="get it: make image"):
        preflight("no:1", CARD)


@pytest.mark.services
@pytest.mark.usefixtures("hook")
def test_user_outside_the_docker_group_is_refused_with_the_command(client: DockerClient) -> None:
    socket = Path(os.environ["DOCKER_HOST"].removeprefix("unix://"))
    refused = run_as(12345, [], lambda: preflight(IMAGE, CARD))
    assert refused.startswith("AccessError: no permission to use Docker's socket: add yourself")
    assert "permission" not in run_as(12345, [socket.stat().st_gid], lambda: preflight(IMAGE, CARD))


def test_container_of_an_ended_process_is_stale() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = owner_of(process.pid)
    assert not is_stale(owner)
    process.communicate(b"\n")
    assert is_stale(owner)


def test_process_with_a_used_id_or_of_another_namespace_is_told_apart() -> None:
    namespace, pid, start = owner_of(os.getpid()).split()
    assert is_stale(f"{namespace} {pid} {int(start) - 1}")
    assert not is_stale(f"pid:[1] {2**22 + 1} 1")
