"""Stores to run one test on each: a folder, a real S3 server, a real OCI registry.

The servers start when the first test asks for them; what is missing there fails, never skips.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pipeline.registry.stores.store import WritableStore

from pipeline.registry.stores.folder import FolderStore

backends = [
    "folder",
    pytest.param("s3", marks=pytest.mark.services),
    pytest.param("oci", marks=pytest.mark.services),
]


class Backends:
    """Makes empty stores; starts each kind of server at most once."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._servers: dict[str, Any] = {}
        self._numbers = itertools.count()

    def store(self, backend: str, folder: Path) -> WritableStore:
        """An empty store.

        Args:
            backend: One of `backends`.
            folder: Where the folder store goes.
        """
        if backend == "folder":
            return FolderStore(path=folder)
        store: WritableStore = self._server(backend).store(f"engines-{next(self._numbers)}")
        return store

    def environ(self, backend: str) -> dict[str, str]:
        """Variables that a process needs to reach the store."""
        found: dict[str, str] = (
            getattr(self._server(backend), "environ", {}) if backend == ("s3") else {}
        )
        return found

    def _server(self, backend: str) -> Any:
        if backend not in self._servers:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            if backend == "s3":
                from tests.services.seaweed import running_server
            else:
                from tests.services.docker_registry import running_server  # type: ignore[assignment]
            self._servers[backend] = self._stack.enter_context(running_server(folder / backend))
        return self._servers[backend]


@contextlib.contextmanager
def running_backends() -> Iterator[Backends]:
    """The body of a session's fixture."""
    with contextlib.ExitStack() as stack:
        yield Backends(stack)
