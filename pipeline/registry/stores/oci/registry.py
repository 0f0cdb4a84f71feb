"""A registry that speaks the OCI distribution API: settings, and the store that they open."""

from __future__ import annotations

import os

import pydantic.dataclasses

from pipeline.core.settings import STRICT
from pipeline.registry.stores.oci.address import parse_address
from pipeline.registry.stores.oci.auth import find_credentials
from pipeline.registry.stores.oci.store import OciStore
from pipeline.registry.stores.oci.transport import Transport


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class OciRegistry:
    """A registry that speaks the OCI distribution API, as a recipe names it.

    Attributes:
        url: `oci://HOST[:PORT]/PREFIX`; the repository of a recipe is `PREFIX/<name>`.
        plain_http: Speak HTTP without TLS; None for only where the host is this machine.
            Credentials never go to another machine in clear.
        public: Whether everybody can read it.
    """

    url: str
    plain_http: bool | None = None
    public: bool = False

    def __post_init__(self) -> None:
        parse_address(self.url, self.plain_http)

    def store(self) -> OciStore:
        """The registry; nothing is asked yet."""
        address = parse_address(self.url, self.plain_http)
        return OciStore(
            url=self.url,
            public=self.public,
            address=address,
            transport=Transport(address.api, find_credentials(address.host, os.environ)),
        )


KIND = OciRegistry
