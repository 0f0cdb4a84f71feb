from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.core.errors import IncompatibleError, TransientError
from pipeline.core.gpu import Gpu
from pipeline.formats.trtllm.docker_engine import connect
from pipeline.formats.trtllm.preflight import (
    driver_fault,
    image_digest,
    preflight,
    require_gpu_runtime,
    require_room,
)
from tests.formats.trtllm.containers.image import IMAGE
from tests.formats.trtllm.containers.users import run_as

if TYPE_CHECKING:
    from docker import DockerClient

CARD = Gpu(
    index=0,
    name="NVIDIA GeForce RTX 4090",
    sm=89,
    memory_bytes=24564 << 20,
    driver="590.44.01",
    uuid="GPU-1",
)


def with_driver(driver: str) -> Gpu:
    return Gpu(**{**vars(CARD), "driver": driver})


@pytest.mark.parametrize(
    ("driver", "cuda", "runs"),
    [
        ("580", "13.1", True),
        ("580.65.06", "13.1", True),
        ("579.99", "13.1", False),
        ("575.57.08", "13.0", False),
        ("610.43.02", "12.4", True),
        ("525.60.13", "12.9", True),
        ("515.105.01", "12.4", False),
        ("[N/A]", "13.1", False),
    ],
)
def test_driver_is_held_against_the_major_version_of_cuda(
    driver: str, cuda: str, runs: bool
) -> None:
    assert (driver_fault(driver, cuda) == "") is runs


def test_driver_fault_names_what_was_found_and_what_is_needed() -> None:
    assert driver_fault("570.26", "13.1").startswith(
        "driver 570.26 is too old for CUDA 13.1, which needs 580 or newer; install"
    )


def test_cuda_that_the_table_does_not_know_is_no_guess() -> None:
    with pytest.raises(ValueError, match=r"CUDA 14\.0 is not known"):
        driver_fault("700.1", "14.0")


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


def test_room_is_held_against_the_images_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    require_room(tmp_path, "some:1", 1)
    with pytest.raises(TransientError, match=r"some:1 needs about 1000000\.0 GB in"):
        require_room(tmp_path, "some:1", 10**15)
    with caplog.at_level(logging.INFO):
        require_room(tmp_path / "in a virtual machine", "some:1", 10**15)
    assert "Cannot see how much space" in caplog.text


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's hook on the PATH, as on a machine with the toolkit."""
    program = tmp_path / "nvidia-container-runtime-hook"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.services
@pytest.mark.usefixtures("hook")
def test_machine_with_all_of_it_passes(client: DockerClient) -> None:
    preflight(IMAGE, cuda="13.1", image_bytes=10**15, gpu=CARD)


@pytest.mark.services
def test_real_engine_without_gpu_runtime_is_refused_first(
    client: DockerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(IncompatibleError, match="install the NVIDIA Container Toolkit"):
        preflight("no:1", cuda="13.1", image_bytes=10**15, gpu=with_driver("1"))


@pytest.mark.services
@pytest.mark.usefixtures("hook")
@pytest.mark.parametrize(
    ("image", "gpu", "image_bytes", "error", "message"),
    [
        ("no:1", with_driver("570.26"), 10**15, IncompatibleError, "RTX 4090: driver 570.26 is"),
        ("no:1", CARD, 10**15, TransientError, "disk full: no:1 needs about"),
        ("no:1", CARD, 1, IncompatibleError, "image no:1 is not on this machine; get it: make"),
        ("me/no:1", CARD, 1, IncompatibleError, "get it: make image"),
        ("localhost:5000/no", CARD, 1, IncompatibleError, "docker pull localhost:5000/no"),
        ("nvcr.io/nvidia/no:1", CARD, 1, IncompatibleError, "docker pull nvcr.io/nvidia/no:1"),
    ],
)
def test_what_a_download_would_not_cure_comes_before_it(
    client: DockerClient,
    image: str,
    gpu: Gpu,
    image_bytes: int,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error) as caught:
        preflight(image, cuda="13.1", image_bytes=image_bytes, gpu=gpu)
    assert message in str(caught.value)


@pytest.mark.services
def test_digest_of_an_image_that_was_built_here_is_its_id(client: DockerClient) -> None:
    assert image_digest(IMAGE) == client.images.get(IMAGE).id
    assert image_digest(IMAGE).startswith("sha256:")
    with pytest.raises(IncompatibleError, match="make image"):
        image_digest("no:1")


@pytest.mark.services
def test_user_outside_the_docker_group_is_told_so(client: DockerClient) -> None:
    def use_docker() -> None:
        with connect():
            pass

    run: Callable[[list[int]], str] = lambda groups: run_as(12345, groups, use_docker)  # noqa: E731
    socket = Path(os.environ["DOCKER_HOST"].removeprefix("unix://"))
    assert run([socket.stat().st_gid]) == ""
    assert run([]).startswith(f"AccessError: no permission to use {socket}: add yourself to the")
