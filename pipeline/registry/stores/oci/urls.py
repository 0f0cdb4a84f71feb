"""URLs that a server may have chosen: whether they keep a secret, and how they are shown."""

from __future__ import annotations

import ipaddress
from urllib.parse import urljoin, urlsplit

from pipeline.core.errors import TransientError


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def keeps_secrets(url: str) -> bool:
    """Whether what is sent to a URL is encrypted, or stays on this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or is_loopback(parts.hostname or "")


def joined(url: str, target: str) -> str:
    """Where a server sends us from a URL; TransientError if that is no URL."""
    try:
        return urlsplit(urljoin(url, target)).geturl()
    except ValueError as error:
        raise TransientError(f"{shown(url)} sends us to no URL, {target[:80]!r}") from error


def shown(url: str) -> str:
    """A URL for a message: its query may hold a signature, and a server may have chosen it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}"[:300]
