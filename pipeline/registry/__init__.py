"""Packages, the references that name them, and the registries that they are published to.

    reference.py   what users type: `smollm2:candidate`; versions that follow from the manifest
    manifest.py    `manifest.json`, whose digest names a package; a folder verified against it
    package.py     seal a folder into a package; where it may be published
    store.py       what every store can do; stores/: a folder, S3, OCI
    trust/         statements: everything signed; which of them count
    resolve.py     a reference -> a verified package; select.py: the best one for this machine
    promotion.py   channels and yanks
    gc.py          remove what nothing needs
    client/        pull and verify

    from pipeline.registry import pull      # what `enginesmith pull` does

Nothing here imports torch or any other builder's library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.registry.client.pull import pull

__all__ = ["pull"]


def __getattr__(name: str) -> Any:
    """Import the client when it is asked for: most importers of this package do not pull."""
    if name == "pull":
        from pipeline.registry.client.pull import pull

        return pull
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
