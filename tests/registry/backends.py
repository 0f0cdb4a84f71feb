"""Stores to run one test on each: a folder, a real S3 server, a real OCI registry.

The servers start when the first test asks for them; what is missing there fails, never skips.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import pytest

from pipeline.registry.stores import open_store
from pipeline.registry.stores.publication import WritableStore
from tests.services import docker_registry, seaweed

_Server = TypeVar("_Server")
backends = [
    "folder",
    pytest.param("s3", marks=pytest.mark.services),
    pytest.param("oci", marks=pytest.mark.services),
]


class Backends(contextlib.ExitStack):
    """Makes empty stores, one of `backends` each; its servers end with the block."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count()
        self._s3 = functools.cache(lambda: self._start(seaweed.running_server))
        self._oci = functools.cache(lambda: self._start(docker_registry.running_server))

    def store(self, backend: str, folder: Path) -> WritableStore:
        """An empty store; one that is a folder lies in `folder`."""
        if backend == "folder":
            return open_store(str(folder))
        server = self._s3() if backend == "s3" else self._oci()
        return server.store(f"engines-{next(self._numbers)}")

    def environ(self, backend: str) -> dict[str, str]:
        """Variables that a process needs to reach the store."""
        return self._s3().environ if backend == "s3" else {}

    def _start(self, running_server: Callable[[Path], AbstractContextManager[_Server]]) -> _Server:
        folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        return self.enter_context(running_server(folder / "server"))
