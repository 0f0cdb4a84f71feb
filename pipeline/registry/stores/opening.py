"""A URL, as users type it after `--registry`, to what it names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from pipeline.core.errors import Fault, RecipeError

if TYPE_CHECKING:
    from pipeline.registry.backend import Registry
    from pipeline.registry.stores.store import WritableStore


def open_store(url: str) -> WritableStore:
    """The store that a URL names; nothing is read yet.

    Args:
        url: A folder, `file:///PATH`, `s3://BUCKET[/PREFIX]` or `oci://HOST[:PORT]/REPOSITORY`.
            What else a store needs comes from its environment variables (see each).

    Raises:
        RecipeError: It is none of them.
    """
    if folder := folder_of(url):
        from pipeline.registry.stores.folder import FolderStore

        return FolderStore(path=folder)
    scheme = urlsplit(url).scheme
    if scheme == "s3":
        from pipeline.registry.stores.s3 import S3Store

        return S3Store(url=url)
    if scheme == "oci":
        from pipeline.registry.stores.oci import OciStore

        return OciStore(url=url)
    raise RecipeError(
        [
            Fault(
                "registry",
                f"{url!r} is not a registry; write a folder, file:///PATH, s3://BUCKET/PREFIX or "
                "oci://HOST/REPOSITORY",
            )
        ]
    )


def open_registry(url: str) -> Registry:
    """The registry that a URL names; nothing is read yet.

    Raises:
        RecipeError: As in `open_store`.
    """
    if folder := folder_of(url):
        from pipeline.registry.folder import FolderRegistry

        return FolderRegistry(path=folder)
    from pipeline.registry.stored import StoredRegistry

    return StoredRegistry(store=open_store(url))


def folder_of(url: str) -> Path | None:
    """The folder that a URL names; None if it names something else."""
    if "://" not in url:
        return Path(url)
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"} and parts.path:
        return Path(unquote(parts.path))
    return None
