"""A real OCI registry for tests: Debian's `docker-registry`, on a loopback port, in a folder."""

from __future__ import annotations

import contextlib
import json
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.registry.stores.oci.registry import OciRegistry
from pipeline.registry.stores.publication import WritableStore
from tests.services.process import free_port, running

INSTALL = "apt-get install -y --no-install-recommends docker-registry"


@dataclass(frozen=True, kw_only=True)
class RunningRegistry:
    """A registry process at `127.0.0.1:PORT`."""

    host: str

    @property
    def url(self) -> str:
        return f"oci://{self.host}"

    def store(self, prefix: str = "engines", **more: Any) -> WritableStore:
        return OciRegistry(url=f"{self.url}/{prefix}", **more).store()


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[RunningRegistry]:
    """Start a registry; afterwards the process is gone, its data stay in the folder."""
    if shutil.which("docker-registry") is None:
        pytest.fail(f"docker-registry is not installed: {INSTALL}")
    folder.mkdir(parents=True, exist_ok=True)
    host = f"127.0.0.1:{free_port()}"
    config = {
        "version": "0.1",
        "log": {"accesslog": {"disabled": True}, "level": "error"},
        "storage": {
            "filesystem": {"rootdirectory": str(folder / "data")},
            "delete": {"enabled": True},
        },
        "http": {"addr": host, "secret": "enginesmith-tests"},
    }
    (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML

    def ready() -> bool:
        with urllib.request.urlopen(f"http://{host}/v2/", timeout=1.0) as reply:
            return bool(reply.status == 200)

    with running(["docker-registry", "serve", "config.yml"], folder, ready, start_s=30.0):
        yield RunningRegistry(host=host)
