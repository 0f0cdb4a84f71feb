"""The Docker engine of this machine: a client of it, or what is wrong and what to do.

Only a local socket will do. An engine behind tcp:// or ssh:// would look for the folders that we
mount on its own disk.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.core.errors import AccessError, IncompatibleError, PipelineError

if TYPE_CHECKING:
    from docker import DockerClient

_DEFAULT_HOST = "unix:///var/run/docker.sock"
_CONNECT_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 300  # starting a container waits for the GPU's hooks


@contextlib.contextmanager
def connect() -> Iterator[DockerClient]:
    """A client of the local engine: `$DOCKER_HOST`, else /var/run/docker.sock.

    Raises:
        IncompatibleError: The `docker` package or the engine is missing, or it is a remote one.
        AccessError: The user may not use its socket.
        PipelineError: The engine went away, or gave an error without a reason.
    """
    host = os.environ.get("DOCKER_HOST") or _DEFAULT_HOST
    if not host.startswith("unix://"):
        raise IncompatibleError(
            f"DOCKER_HOST is {host}: a remote Docker engine does not see this machine's folders; "
            "run on the engine's own machine, with DOCKER_HOST unset or a unix:// socket"
        )
    try:
        import docker
        import requests
    except ImportError as error:
        raise IncompatibleError(
            "the docker package is not installed here: pip install '.[build]' in the checkout"
        ) from error
    _knock(host.removeprefix("unix://"))
    with contextlib.ExitStack() as stack:
        try:
            client = docker.DockerClient(host, timeout=_ANSWER_TIMEOUT_S)
            stack.callback(client.close)
            yield client
        except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
            raise PipelineError(
                f"the Docker engine failed: {error}; see whether `docker info` answers, and the "
                "log of dockerd"
            ) from error


def _knock(path: str) -> None:
    """Open the socket once: the SDK has one message for every reason why it cannot."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_CONNECT_TIMEOUT_S)
            probe.connect(path)
    except PermissionError as error:
        raise AccessError(
            f"no permission to use {path}: add yourself to the docker group "
            "(sudo usermod -aG docker $USER), then log in again"
        ) from error
    except FileNotFoundError as error:
        raise IncompatibleError(
            f"no Docker socket {path} in this pod: run the pod itself from the build image, where "
            "trtllm-build is on the PATH"
            if "KUBERNETES_SERVICE_HOST" in os.environ
            else f"no Docker engine here (no socket {path}): install one "
            "(https://docs.docker.com/engine/install/), or set DOCKER_HOST to its socket"
        ) from error
    except OSError as error:
        raise IncompatibleError(
            f"the Docker engine does not answer on {path} ({error}); start it: "
            "sudo systemctl start docker"
        ) from error
