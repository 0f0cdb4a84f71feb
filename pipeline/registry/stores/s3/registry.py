"""A registry in a bucket: settings, and the store that they open."""

from __future__ import annotations

from typing import Annotated

import pydantic.dataclasses
from pydantic import Field

from pipeline.core.settings import STRICT
from pipeline.registry.stores.s3.address import check_endpoint, parse_address
from pipeline.registry.stores.s3.connection import Checksums, Connection
from pipeline.registry.stores.s3.objects import S3Objects
from pipeline.registry.stores.tree import TreeStore


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class S3Registry:
    """A registry in a bucket, as a recipe names it.

    Attributes:
        url: `s3://BUCKET[/PREFIX]`.
        endpoint_url: Of a server that is not Amazon's; None for what boto3 finds, such as
            `AWS_ENDPOINT_URL_S3`.
        region: None for what boto3 finds, such as `AWS_REGION`.
        request_checksum_calculation: `when_required` sends no checksums, for servers that refuse
            them; then what was sent is read back. None for what boto3 finds, such as
            `AWS_REQUEST_CHECKSUM_CALCULATION`.
        public: Whether everybody can read the bucket. Then it is read without credentials, if there
            are none.
        part_bytes: Size of the parts of a large file; 5 MiB is the least that S3 takes (Amazon S3
            User Guide, "Multipart upload limits").
    """

    url: str
    endpoint_url: str | None = None
    region: str | None = None
    request_checksum_calculation: Checksums | None = None
    public: bool = False
    part_bytes: Annotated[int, Field(ge=5 << 20, le=64 << 20)] = 8 << 20

    def __post_init__(self) -> None:
        parse_address(self.url)
        if self.endpoint_url is not None:
            check_endpoint(self.endpoint_url)

    def store(self) -> TreeStore:
        """The registry; nothing is read yet."""
        connection = Connection(
            address=parse_address(self.url),
            endpoint_url=self.endpoint_url,
            region=self.region,
            checksums=self.request_checksum_calculation,
            public=self.public,
        )
        return TreeStore(
            objects=S3Objects(
                url=self.url,
                public=self.public,
                connection=connection,
                part_bytes=self.part_bytes,
            )
        )


KIND = S3Registry
