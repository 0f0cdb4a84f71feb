"""The boto3 client of a store: made when it is first needed, and once in each process."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.registry.stores.s3.address import parse_address
from pipeline.registry.stores.s3.bucket import Bucket
from pipeline.registry.stores.s3.faults import s3_errors

Checksums = Literal["when_supported", "when_required"]

_CONNECT_S, _READ_S = 10, 60  # a server that is silent for so long has gone
_ATTEMPTS = 5  # of each request, waiting 1, 2, 4, 8 s between them at most
_CONNECTIONS = 32  # more than anybody opens: the pull client reads 16 pieces at once


@dataclass(kw_only=True)
class Connection:
    """Where and how to connect; see `S3Store` for its attributes."""

    url: str
    endpoint_url: str | None
    region: str | None
    checksums: Checksums | None
    public: bool
    _bucket: Bucket | None = None
    _pid: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def bucket(self) -> Bucket:
        """The bucket, connected.

        A fork gets a connection of its own: two processes that read one socket mix up replies.
        """
        if self._bucket is None or self._pid != os.getpid():
            if self._pid != os.getpid():
                self._lock = threading.Lock()  # the parent may have held it while it forked
            with self._lock:
                if self._bucket is None or self._pid != os.getpid():
                    self._bucket = self._connect()
                    self._pid = os.getpid()
        return self._bucket

    def _connect(self) -> Bucket:
        import boto3
        import botocore.session
        from botocore import UNSIGNED

        address = parse_address(self.url)
        with s3_errors(f"connect to {self.url}", address.bucket):
            core = botocore.session.get_session()
            wanted = self.checksums or core.get_config_variable("request_checksum_calculation")
            checksums = str(wanted).lower() != "when_required"
            session = boto3.session.Session(botocore_session=core)
            signs = not (self.public and session.get_credentials() is None)

            def client(*, checksums: bool) -> Any:
                # A payload is signed by its SHA-256, of each part once more. Where a checksum goes
                # along, that and the SHA-256 in the manifest protect the bytes.
                payload: dict[str, Any] = {"payload_signing_enabled": False} if checksums else {}
                how = {"s3": payload} if signs else {"signature_version": UNSIGNED}
                return self._client(session, **how)

            return Bucket(
                client=client(checksums=checksums),
                address=address,
                url=self.url,
                checksums=checksums,
                client_without_checksums=lambda: client(checksums=False),
            )

    def _client(self, session: Any, **extra: Any) -> Any:
        from botocore.config import Config

        config = Config(
            connect_timeout=_CONNECT_S,
            read_timeout=_READ_S,
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
            max_pool_connections=_CONNECTIONS,
            tcp_keepalive=True,
            # We send and compare our own, computed in the one pass that reads a file.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            **extra,
        )
        return session.client(
            "s3", endpoint_url=self.endpoint_url, region_name=self.region, config=config
        )
