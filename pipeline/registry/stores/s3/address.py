"""An `s3://` URL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from pipeline.core.errors import Fault, RecipeError

# Amazon S3 User Guide, "General purpose bucket naming rules"; access point ARNs are not taken.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, kw_only=True)
class Address:
    """Which bucket, and what of it is ours.

    Attributes:
        bucket: Its name.
        root: What all our keys start with: empty, or it ends in `/`.
    """

    bucket: str
    root: str


def parse_address(url: str) -> Address:
    """Read `s3://BUCKET[/PREFIX]`.

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
    return Address(bucket=parts.netloc, root=f"{prefix}/" if prefix else "")


def check_endpoint(endpoint_url: str) -> None:
    """Stop an endpoint that is no plain URL of a server.

    Raises:
        RecipeError: It is none.
    """
    parts = urlsplit(endpoint_url)
    if "@" in parts.netloc:
        raise _fault("an S3 endpoint holds no credentials; put them into AWS_ACCESS_KEY_ID")
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise _fault(f"{endpoint_url!r} is not an S3 endpoint; write https://HOST[:PORT]")


def _fault(message: str) -> RecipeError:
    return RecipeError([Fault("registry", message)])
