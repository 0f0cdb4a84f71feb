"""A real Docker engine for tests, with no systemd, no network bridge and a data root of its own.

Needs root, Debian's `docker.io` and `busybox-static`. What is missing fails the test that asks for
the engine; nothing is skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.services.process import running

INSTALL = "apt-get install -y --no-install-recommends docker.io busybox-static"

_STOP_S = 30.0


@pytest.fixture(scope="session")
def dockerd() -> Iterator[str]:
    """`DOCKER_HOST` of an empty engine that lives as long as the test session."""
    with running_dockerd() as host:
        yield host


@contextlib.contextmanager
def running_dockerd() -> Iterator[str]:
    """Start an engine; afterwards its containers, processes, mounts, cgroups and files are gone."""
    missing = [name for name in ("dockerd", "busybox") if shutil.which(name) is None]
    if missing:
        pytest.fail(f"{', '.join(missing)} not installed: {INSTALL}")
    if os.geteuid() != 0:
        pytest.fail("a Docker engine of one's own needs root: run these tests as root")
    work = Path(tempfile.mkdtemp(prefix="dockerd-"))
    work.chmod(0o755)  # its socket is for more users than root
    try:
        _configure(work)

        def ready() -> bool:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(1.0)
                client.connect(str(work / "docker.sock"))
                client.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
                return b"200 OK" in client.recv(4096)

        command = ["dockerd", "--config-file", str(work / "daemon.json")]
        try:
            with running(command, work, ready, start_s=30.0, stop_s=_STOP_S):
                try:
                    yield f"unix://{work / 'docker.sock'}"
                finally:  # of the containers, without a word to the engine: it may hang
                    for group in _cgroups(work):
                        _kill(map(int, (group / "cgroup.procs").read_text().split()))
        finally:
            _kill(_processes_of(work))  # containerd and its shims, should it have been killed
    finally:
        _remove_cgroups(work)
        _unmount(work)
        shutil.rmtree(work)


def _configure(work: Path) -> None:
    config = {
        "data-root": str(work / "data"),
        "exec-root": str(work / "exec"),
        "pidfile": str(work / "dockerd.pid"),
        "hosts": [f"unix://{work / 'docker.sock'}"],
        "storage-driver": "overlay2",
        "exec-opts": ["native.cgroupdriver=cgroupfs"],
        "cgroup-parent": f"/{work.name}",  # a name of its own, so that it can be cleaned up
        # No bridge: it would change the machine's firewall, and no container here has a network.
        "bridge": "none",
        "iptables": False,
        "ip6tables": False,
        "ip-forward": False,
        "ip-masq": False,
        "oom-score-adjust": 0,  # the default, a negative one, needs CAP_SYS_RESOURCE
    }
    (work / "daemon.json").write_text(json.dumps(config))


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _processes_of(work: Path) -> list[int]:
    """Ids of what the engine started and left behind, by the folder on their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"{work}/".encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


def _unmount(work: Path) -> None:
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in reversed([path for path in mounts if path.startswith(f"{work}/")]):
        subprocess.run(["umount", "--lazy", mount], check=False)


def _cgroups(work: Path) -> list[Path]:
    """The engine's groups, the inner ones first."""
    root = Path("/sys/fs/cgroup")
    tops = (*root.glob(work.name), *root.glob(f"*/{work.name}"))  # cgroup v2, v1
    return sorted((path.parent for top in tops for path in top.rglob("cgroup.procs")), reverse=True)


def _remove_cgroups(work: Path) -> None:
    """Remove the groups; what was killed in them takes a moment to die."""
    end = time.monotonic() + _STOP_S
    for group in _cgroups(work):
        while group.exists():
            try:
                group.rmdir()
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
