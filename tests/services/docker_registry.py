"""A real OCI registry for tests: Debian's `docker-registry`, on a loopback port, in a folder.

What is missing fails the test that asks for it; nothing is skipped.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.registry.stores.oci.registry import OciRegistry
from pipeline.registry.stores.publication import WritableStore

INSTALL = "apt-get install -y --no-install-recommends docker-registry"

_START_S = 30.0
_STOP_S = 10.0


@dataclass(kw_only=True)
class RunningRegistry:
    """A registry process.

    Attributes:
        host: `127.0.0.1:PORT`.
        folder: Where it keeps everything.
    """

    host: str
    folder: Path
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"oci://{self.host}"

    def store(self, prefix: str = "engines", **more: Any) -> WritableStore:
        return OciRegistry(url=f"{self.url}/{prefix}", **more).store()

    def start(self) -> None:
        with (self.folder / "registry.log").open("ab") as stream:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", str(self.folder / "config.yml")],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        end = time.monotonic() + _START_S
        while self._process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection(self.host, timeout=1.0)
                connection.request("GET", "/v2/")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.02)
        log = (self.folder / "registry.log").read_text(errors="replace").splitlines()
        pytest.fail("\n".join(["docker-registry did not start; the end of its log:", *log[-20:]]))

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[RunningRegistry]:
    """Start a registry; afterwards the process is gone, its folder stays.

    Args:
        folder: Keeps its data; made if missing.
    """
    if shutil.which("docker-registry") is None:
        pytest.fail(f"docker-registry is not installed: {INSTALL}")
    folder.mkdir(parents=True, exist_ok=True)
    host = f"127.0.0.1:{_free_port()}"
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
    registry = RunningRegistry(host=host, folder=folder)
    try:
        registry.start()
        yield registry
    finally:
        registry.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
