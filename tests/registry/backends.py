"""Stores to run one test on each: a folder, a real S3 server, a real OCI registry.

The servers start when the first test asks for them; what is missing there fails, never skips.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.registry.stores import open_store
from pipeline.registry.stores.publication import WritableStore
from tests.services import docker_registry, seaweed

backends = [
    "folder",
    pytest.param("s3", marks=pytest.mark.services),
    pytest.param("oci", marks=pytest.mark.services),
]


class Backends:
    """Makes empty stores; starts each kind of server at most once."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._servers: dict[str, seaweed.SeaweedServer | docker_registry.RunningRegistry] = {}
        self._numbers = itertools.count()

    def store(self, backend: str, folder: Path) -> WritableStore:
        """An empty store.

        Args:
            backend: One of `backends`.
            folder: Where the folder store goes.
        """
        if backend == "folder":
            return open_store(str(folder))
        return self._server(backend).store(f"engines-{next(self._numbers)}")

    def environ(self, backend: str) -> dict[str, str]:
        """Variables that a process needs to reach the store."""
        if backend != "s3":
            return {}
        server = self._server(backend)
        assert isinstance(server, seaweed.SeaweedServer)
        return server.environ

    def _server(self, backend: str) -> seaweed.SeaweedServer | docker_registry.RunningRegistry:
        if backend not in self._servers:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            running = seaweed if backend == "s3" else docker_registry
            self._servers[backend] = self._stack.enter_context(
                running.running_server(folder / backend)
            )
        return self._servers[backend]


@contextlib.contextmanager
def running_backends() -> Iterator[Backends]:
    """Servers that end with the block."""
    with contextlib.ExitStack() as stack:
        yield Backends(stack)
