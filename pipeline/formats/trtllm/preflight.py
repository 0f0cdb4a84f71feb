"""Whether this machine can run the build image: asked before anything is pulled or started."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import IncompatibleError, TransientError
from pipeline.core.gpu import Gpu
from pipeline.formats.trtllm.docker_engine import connect

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.images import Image

log = logging.getLogger(__name__)

NO_GPU_RUNTIME = (
    "Docker cannot give a container the GPU here: install the NVIDIA Container Toolkit "
    "(https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/), then run "
    "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
)
OLDEST_DRIVER = {"12": "525", "13": "580"}
"""By CUDA's major version, the oldest NVIDIA driver (Linux) that runs any release of it; NVIDIA's
forward compatibility package is not counted on, since GeForce cards cannot use it. Source: CUDA
Compatibility, "Minor Version Compatibility", table 1,
https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"""
_GPU_HOOKS = ("nvidia-container-runtime-hook", "nvidia-cdi-hook")
"""`docker run --gpus` needs one of them on the engine's PATH, not the `nvidia` runtime (Moby, pull
request 50228): an engine that does not list the runtime may still do."""


def preflight(image: str, *, cuda: str, image_bytes: int, gpu: Gpu) -> None:
    """Make every check, those first that having the image would not cure.

    Args:
        image: Name of the image, with tag or digest.
        cuda: CUDA release in the image, such as `13.1`.
        image_bytes: Space that the unpacked image takes; asked for only while it is not here.
        gpu: The card that the container is for.

    Raises:
        IncompatibleError: Something is missing, too old or remote.
        AccessError: The user may not use Docker.
        TransientError: Too little disk space for the image.
    """
    with connect() as client:
        require_gpu_runtime(client.info())
        require_driver(gpu, cuda)
        if find_image(client, image) is None:
            require_room(Path(client.info()["DockerRootDir"]), image, image_bytes)
        require_image(client, image)


def require_gpu_runtime(info: dict[str, Any]) -> None:
    """Demand that Docker can hand out GPUs, by what the engine says of itself.

    Raises:
        IncompatibleError: It has no NVIDIA runtime and no NVIDIA CDI device, and we see no hook.
    """
    devices = [str(device.get("ID", "")) for device in info.get("DiscoveredDevices") or ()]
    if not (
        "nvidia" in (info.get("Runtimes") or {})
        or any(device.startswith("nvidia.com/gpu") for device in devices)
        or any(shutil.which(hook) for hook in _GPU_HOOKS)
    ):
        raise IncompatibleError(NO_GPU_RUNTIME)


def find_image(client: DockerClient, image: str) -> Image | None:
    """The image, if the engine holds it; nothing is ever pulled in passing."""
    import docker

    try:
        return client.images.get(image)
    except docker.errors.ImageNotFound:
        return None


def require_image(client: DockerClient, image: str) -> Image:
    """Demand that the engine holds this image.

    Raises:
        IncompatibleError: It does not; says how to get it.
    """
    if (found := find_image(client, image)) is not None:
        return found
    registry = image.split("/")[0] if "/" in image else ""
    way_on = f"docker pull {image}" if "." in registry or ":" in registry else "make image"
    raise IncompatibleError(f"the image {image} is not on this machine; get it: {way_on}")


def require_room(data_root: Path, image: str, image_bytes: int) -> None:
    """Demand disk space for an image where Docker keeps its data.

    Raises:
        TransientError: Too little is free.
    """
    try:
        free_bytes = shutil.disk_usage(data_root).free
    except OSError as error:  # an engine in a virtual machine has a disk that we do not see
        log.info("Cannot see how much space Docker has for images: %s", error)
        return
    if free_bytes < image_bytes:
        raise TransientError(
            f"disk full: {image} needs about {image_bytes / 1e9:.1f} GB in {data_root}, "
            f"{free_bytes / 1e9:.1f} GB are free; free some (docker system prune), or move "
            "Docker's data-root to a larger disk"
        )


def require_driver(gpu: Gpu, cuda: str) -> None:
    """Demand a driver that runs this CUDA release.

    Raises:
        IncompatibleError: See `driver_fault`.
    """
    if fault := driver_fault(gpu.driver, cuda):
        raise IncompatibleError(f"{gpu.name}: {fault}")


def driver_fault(driver: str, cuda: str) -> str:
    """Why this NVIDIA driver (such as `580.65.06`) cannot run this CUDA release; empty if it can.

    Raises:
        ValueError: The release's major version is not known.
    """
    if (minimum := OLDEST_DRIVER.get(cuda.split(".")[0])) is None:
        raise ValueError(
            f"CUDA {cuda} is not known; add its oldest driver: {sorted(OLDEST_DRIVER)}"
        )
    if _version(driver) >= _version(minimum):
        return ""
    return (
        f"driver {driver} is too old for CUDA {cuda}, which needs {minimum} or newer; install a "
        "newer driver, or use an image with an older CUDA"
    )


def image_digest(image: str) -> str:
    """What a manifest records of an image: `repository@sha256:…`, for one built here its id.

    Raises:
        IncompatibleError: The image is not here, or see `connect`.
        AccessError: See `connect`.
    """
    with connect() as client:
        found = require_image(client, image)
        return str(next(iter(found.attrs["RepoDigests"] or ()), found.id))


def _version(text: str) -> tuple[int, ...]:
    """`580.65.06` -> (580, 65, 6)."""
    return tuple(int(number) for number in re.findall(r"\d+", text))
