"""A registry in a bucket: settings, and the store that they open."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

import pydantic.dataclasses
from pydantic import Field

from pipeline.core.errors import Fault, RecipeError
from pipeline.core.settings import STRICT
from pipeline.registry.stores.s3.connection import Connection
from pipeline.registry.stores.s3.objects import S3Objects
from pipeline.registry.stores.tree import TreeStore

# Amazon S3 User Guide, "General purpose bucket naming rules"; access point ARNs are not taken.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class S3Registry:
    """A registry in a bucket, as a recipe names it.

    Endpoint, region, credentials and whether checksums are sent come from where boto3 finds them:
    `AWS_ENDPOINT_URL_S3`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, and `AWS_REQUEST_CHECKSUM_CALCULATION`
    (`when_required` for servers that refuse checksums; then what was sent is read back).

    Attributes:
        url: `s3://BUCKET[/PREFIX]`.
        public: Whether everybody can read the bucket. Then it is read without credentials, if there
            are none.
        part_bytes: Size of the parts of a large file; 5 MiB is the least that S3 takes (Amazon S3
            User Guide, "Multipart upload limits").
    """

    url: str
    public: bool = False
    part_bytes: Annotated[int, Field(ge=5 << 20, le=64 << 20)] = 8 << 20

    def __post_init__(self) -> None:
        parse_address(self.url)

    def store(self) -> TreeStore:
        """The registry; nothing is read yet."""
        bucket, root = parse_address(self.url)
        connection = Connection(bucket=bucket, root=root, public=self.public)
        objects = S3Objects(url=self.url, connection=connection, part_bytes=self.part_bytes)
        return TreeStore(objects=objects, public=self.public)


def parse_address(url: str) -> tuple[str, str]:
    """Bucket, and what our keys in it start with, of `s3://BUCKET[/PREFIX]`.

    Raises:
        RecipeError: It is not such a URL; says why.
    """
    parts = urlsplit(url)
    if parts.scheme != "s3" or parts.query or parts.fragment:
        raise _fault(f"{url!r} is not an S3 registry; write s3://BUCKET/PREFIX")
    if "@" in parts.netloc:
        raise _fault("an S3 URL holds no credentials; put them into AWS_ACCESS_KEY_ID and so on")
    if not _BUCKET.fullmatch(parts.netloc):
        raise _fault(
            f"{parts.netloc!r} in {url!r} is not a bucket's name: 3 to 63 lowercase letters, "
            "digits, dots and dashes"
        )
    prefix = parts.path.strip("/")
    for segment in prefix.split("/") if prefix else ():
        if not _SEGMENT.fullmatch(segment) or segment in {".", ".."}:
            raise _fault(
                f"{segment!r} in {url!r} may not be in a prefix: letters, digits, dots, dashes "
                "and underscores"
            )
    return parts.netloc, f"{prefix}/" if prefix else ""


def _fault(message: str) -> RecipeError:
    return RecipeError([Fault("registry", message)])


KIND = S3Registry
