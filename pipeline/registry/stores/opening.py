"""A URL, as users type it after `--registry`, to the store that it names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.core.data import cache_root
from pipeline.core.errors import Fault, RecipeError
from pipeline.registry.store import Place, Store, WritableStore


def open_store(url: str) -> WritableStore:
    """The store that a URL names; nothing is read yet.

    Args:
        url: A folder, `file:///PATH`, `s3://BUCKET[/PREFIX]` or `oci://HOST[:PORT]/REPOSITORY`.
            What else a store needs comes from its environment variables (see each).

    Raises:
        RecipeError: It is none of them.
    """
    if folder := folder_of(url):
        from pipeline.registry.stores.folder import FolderRegistry

        return FolderRegistry(path=folder).store()
    scheme = urlsplit(url).scheme
    if scheme == "s3":
        from pipeline.registry.stores.s3.registry import S3Registry

        return S3Registry(url=url).store()
    if scheme == "oci":
        from pipeline.registry.stores.oci.registry import OciRegistry

        return OciRegistry(url=url).store()
    raise RecipeError(
        [
            Fault(
                "registry",
                f"{url!r} is not a registry; write a folder, file:///PATH, s3://BUCKET/PREFIX or "
                "oci://HOST/REPOSITORY",
            )
        ]
    )


def folder_of(url: str) -> Path | None:
    """The folder that a URL names; None if it names something else."""
    if "://" not in url:
        return Path(url)
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"} and parts.path:
        return Path(unquote(parts.path))
    return None


def package_dir(store: Store, place: Place) -> Path | None:
    """The folder of a package that a runtime can load in place; None unless the store is local."""
    if not store.local:
        return None
    from pipeline.registry.stores.layout import version_key

    return Path(store.url) / version_key(place)


def staging_area(store: Store) -> Path:
    """Where to seal a package for a store: its own file system, so that files are moved there."""
    if not store.local:
        return cache_root() / "staging"
    from pipeline.registry.stores.folder import STAGING

    return Path(store.url) / STAGING
