"""The boto3 client of a registry: made when it is first needed, and once in each process."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import Any

from pipeline.registry.stores.s3.faults import s3_errors
from pipeline.registry.stores.transfer import (
    ATTEMPTS,
    CONNECT_S,
    CONNECTIONS,
    SILENCE_S,
    timed_pools,
)


@dataclass(kw_only=True)
class Connection:
    """Where and how to connect.

    Attributes:
        bucket: Its name.
        root: What all our keys start with: empty, or it ends in `/`.
        public: Read without credentials, if there are none.
    """

    bucket: str
    root: str
    public: bool
    _clients: dict[int, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self) -> Any:
        """The client of this process: two processes that read one socket mix up replies."""
        pid = os.getpid()
        if pid not in self._clients:
            if self._clients:
                self._lock = threading.Lock()  # the parent may have held it while it forked
            with self._lock:
                if pid not in self._clients:
                    self._clients[pid] = self._connect()
        return self._clients[pid]

    def sends_checksums(self) -> bool:
        """Whether the server compares what arrives, and tells a checksum of it afterwards."""
        wanted: str = self.client().meta.config.request_checksum_calculation
        return wanted.lower() != "when_required"

    def _connect(self) -> Any:
        import boto3
        from botocore import UNSIGNED
        from botocore.awsrequest import AWSHTTPConnection, AWSHTTPSConnection
        from botocore.config import Config

        with s3_errors(f"connect to s3://{self.bucket}", self.bucket):
            session = boto3.session.Session()
            signs = not (self.public and session.get_credentials() is None)
            config = Config(
                connect_timeout=CONNECT_S,
                read_timeout=SILENCE_S,
                retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                max_pool_connections=CONNECTIONS,
                tcp_keepalive=True,
                # Every byte is compared with the manifest's SHA-256.
                response_checksum_validation="when_required",
                **({} if signs else {"signature_version": UNSIGNED}),
            )
            client = session.client("s3", config=config)
            # botocore has no setting for its connection classes; urllib3's pool manager has.
            manager = client._endpoint.http_session._manager
            manager.pool_classes_by_scheme = timed_pools(AWSHTTPConnection, AWSHTTPSConnection)
            return client
