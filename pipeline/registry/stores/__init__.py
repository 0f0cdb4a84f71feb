"""Where packages lie: a folder, S3, an OCI registry; bytes in, bytes out.

A new kind is one file with a line `KIND = `, named like the scheme of its URLs; nothing lists it.
What only a publisher needs lies in modules that readers do not import. Nothing here believes what
it reads: digests and signatures are checked above.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from pipeline.core.errors import Fault, RecipeError
from pipeline.core.settings import marked_modules, read_mark
from pipeline.registry.store import Place, Store

if TYPE_CHECKING:
    from pipeline.registry.stores.publication import WritableStore


@runtime_checkable
class Registry(Protocol):
    """A registry as a recipe names it; opening it reads nothing."""

    def reader(self) -> Store:
        """Where it keeps its packages, to read."""

    def store(self) -> WritableStore:
        """The same, to publish, too."""


def open_reader(url: str) -> Store:
    """The store that a URL names, for readers only; see `open_store`."""
    return _registry(url).reader()


def open_store(url: str) -> WritableStore:
    """The store that a URL names, such as `s3://BUCKET/PREFIX`; RecipeError if it names none."""
    return _registry(url).store()


def _registry(url: str) -> Registry:
    kinds = marked_modules(__name__, "KIND", "registry")
    scheme = urlsplit(url).scheme
    if folder := folder_of(url):
        made: Registry = read_mark(kinds["folder"], "KIND")(path=folder)
        return made
    if scheme == "folder" or scheme not in kinds:
        known = " or ".join(f"{kind}://..." for kind in kinds if kind != "folder")
        fault = f"{url!r} is not a registry; write a folder, file:///PATH, {known}"
        raise RecipeError([Fault("registry", fault)])
    made = read_mark(kinds[scheme], "KIND")(url=url)
    return made


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
    from pipeline.registry.stores.tree import version_key

    return Path(store.url) / version_key(place)
