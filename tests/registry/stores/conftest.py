"""Stores to run one test on each; the servers start when the first test asks for them.

What is missing on this machine fails, never skips.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.registry.store import WritableStore
from pipeline.registry.stores.folder import FolderRegistry

STORES = ["folder"]


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> WritableStore:
    """An empty store of each kind."""
    found: WritableStore = request.getfixturevalue(f"{request.param}_store")
    return found


@pytest.fixture
def folder_store(tmp_path: Path) -> WritableStore:
    return FolderRegistry(path=tmp_path / "artifacts").store()


@pytest.fixture
def age(request: pytest.FixtureRequest, store: WritableStore) -> Callable[[float], None]:
    """Lets everything in a store be older by so many seconds."""
    if store.local:
        return lambda seconds: _age_folder(Path(store.url), seconds)
    raise NotImplementedError(store.url)


def _age_folder(root: Path, seconds: float) -> None:
    for path in root.rglob("*"):
        then = min(path.lstat().st_mtime, time.time()) - seconds
        os.utime(path, (then, then), follow_symlinks=False)
