"""Containers that a killed process left behind: each names its owner in a label."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from docker import DockerClient

log = logging.getLogger(__name__)

OWNER_LABEL = "enginesmith.owner"


def remove(client: DockerClient, name: str) -> None:
    """Remove a container, running or not; should that fail, it hides no other error."""
    import docker
    import requests

    try:
        client.api.remove_container(name, force=True, v=True)
    except docker.errors.NotFound:
        pass
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        log.warning("A container is left; remove it: docker rm -f %s (%s)", name, error)


def remove_stale(client: DockerClient) -> None:
    """Remove the containers that killed processes of this machine left behind."""
    labelled = {"label": OWNER_LABEL}
    for handle in client.containers.list(all=True, filters=labelled, ignore_removed=True):
        if is_stale(handle.labels[OWNER_LABEL]):
            log.warning("Removing %s, left behind by a run that was killed", handle.name)
            remove(client, handle.name)


def owner_of(pid: int) -> str:
    """Names a process beyond its end: PID namespace, id, start in ticks since boot.

    The namespace, because in another one (a container with the engine's socket) the same id means
    another process; the start, because ids are used again.
    """
    # After the command's closing parenthesis comes the third field; the start is the 22nd.
    start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{Path('/proc/self/ns/pid').readlink()} {pid} {start}"


def is_stale(owner: str) -> bool:
    """Whether the process that a label names has ended; False when that cannot be known."""
    namespace, pid, _ = owner.split()
    if namespace != str(Path("/proc/self/ns/pid").readlink()):
        return False
    try:
        os.kill(int(pid), 0)  # asks only whether it exists
        return owner_of(int(pid)) != owner
    except ProcessLookupError:
        return True
    except OSError:  # another user's, which /proc may hide from us
        return False
