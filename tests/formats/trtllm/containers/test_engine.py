from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import IncompatibleError
from pipeline.formats.trtllm.docker_engine import connect


def refusal() -> str:
    with pytest.raises(IncompatibleError) as caught, connect():
        pass
    return str(caught.value)


@pytest.mark.parametrize("host", ["tcp://127.0.0.1:2375", "ssh://me@there", "npipe:////./pipe/d"])
def test_engine_that_is_not_local_is_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", host)
    assert refusal().startswith(f"DOCKER_HOST is {host}: a remote Docker engine does not see")


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "docker", None)
    assert "pip install '.[build]'" in refusal()


def test_missing_engine_names_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    assert refusal().startswith(f"no Docker engine here (no socket {tmp_path}/docker.sock)")


def test_pod_is_not_told_to_install_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    assert "in this pod: run the pod itself from the build image" in refusal()


def test_socket_that_nobody_serves_is_an_engine_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/s")
    assert "start it: sudo systemctl start docker" in refusal()
