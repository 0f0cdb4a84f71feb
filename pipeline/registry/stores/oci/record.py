"""Remembers the digests of uploaded layers, so that an interrupted publish is not sent again.

A layer's digest follows from its plan, but computing it takes a pass over its files; so each one
that a registry has taken is noted in the cache folder, by a digest of its plan. A note is only a
hint where to look: the layer is skipped if the registry has a blob of that digest and size, and
whoever publishes reads everything back. Losing the notes costs an upload.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import rfc8785

from pipeline.core.cache import cache_root
from pipeline.registry.stores.oci.documents import check_digest
from pipeline.registry.stores.oci.image import Layer


def known_digest(layer: Layer) -> str | None:
    """The digest that a layer had when it was uploaded; None if it is not known."""
    with contextlib.suppress(OSError, ValueError):
        return check_digest(_path(layer).read_text())
    return None


def remember(layer: Layer, digest: str) -> None:
    """Note a layer's digest; where nothing can be written, nothing is."""
    path = _path(layer)
    private = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        private.write_text(digest)
        private.replace(path)


def _path(layer: Layer) -> Path:
    plan: list[Any] = [[member.header.hex(), member.file.to_json()] for member in layer.members]
    return cache_root() / "oci-layers" / hashlib.sha256(rfc8785.dumps(plan)).hexdigest()
