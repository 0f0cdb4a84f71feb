from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.core.errors import IncompatibleError
from pipeline.formats.trtllm.place import (
    is_stale,
    owner_of,
    preflight,
    require_driver,
    require_gpu_runtime,
)
from tests.formats.trtllm.containers.image import CARD, IMAGE
from tests.formats.trtllm.containers.users import run_as

if TYPE_CHECKING:
    from docker import DockerClient


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


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's hook on the PATH, as on a machine with the toolkit."""
    program = tmp_path / "nvidia-container-runtime-hook"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


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
def test_engine_without_a_gpu_runtime_is_refused_before_the_driver_is(client: DockerClient) -> None:
    with pytest.raises(IncompatibleError, match="install the NVIDIA Container Toolkit"):
        preflight("no:1", dataclasses.replace(CARD, driver="1"))


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
