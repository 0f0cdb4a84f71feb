"""The tests' image: busybox, made on the spot from nothing."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.gpu import Gpu

if TYPE_CHECKING:
    from docker import DockerClient

IMAGE = "enginesmith-build:test"
CARD = Gpu(
    name="NVIDIA GeForce RTX 4090",
    sm=89,
    driver="580.65.06",
    uuid="GPU-1",
)

_DOCKERFILE = b"""
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "sh", "-c", \
     "/bin/busybox mkdir -p /usr/bin /usr/sbin /sbin /tmp && /bin/busybox --install -s"]
"""


def build_image(client: DockerClient) -> str:
    """Build the image in this engine; its name."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        dockerfile = tarfile.TarInfo("Dockerfile")
        dockerfile.size = len(_DOCKERFILE)
        tar.addfile(dockerfile, io.BytesIO(_DOCKERFILE))
        entry = tar.gettarinfo(str(Path(busybox).resolve()), "busybox")
        entry.mode = 0o755
        with Path(busybox).open("rb") as stream:
            tar.addfile(entry, stream)
    context.seek(0)
    client.images.build(fileobj=context, custom_context=True, tag=IMAGE, rm=True)
    return IMAGE
