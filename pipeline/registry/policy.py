"""What may be published where, by the licence of the weights; pure but for a rehearsal's mark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import Fault, RecipeError
from pipeline.core.values import Licence

_MARK = ".rehearsal"
"""Top-level file of a folder registry that is removed after one rehearsal."""


def publish_faults(licence: Licence, *, public: bool) -> Iterator[Fault]:
    """Why weights must not be published; nothing if they may."""
    if licence.gated and licence.acknowledged != licence.spdx:
        got = f", got {licence.acknowledged}" if licence.acknowledged else ""
        yield Fault(
            "source.acknowledge_licence",
            f"these weights are gated, and passing them on binds you to their licence: read it at "
            f"{licence.read_at}, then set source.acknowledge_licence={licence.spdx}{got}",
        )
    if public and licence.redistribution == "forbidden":
        yield Fault(
            "registry",
            f"everybody can read this registry, and the recipe does not say that {licence.spdx} "
            "allows to pass the weights on; choose a private registry, or read the licence and set "
            "source.redistribution to what it says: allowed or with-notice",
        )


def require_publishable(licence: Licence, *, public: bool) -> None:
    """Stop a build, before any download, whose package could not be published.

    Raises:
        RecipeError: With all faults of `publish_faults`.
    """
    if faults := tuple(publish_faults(licence, public=public)):
        raise RecipeError(faults)


def require_manifest_publishable(
    manifest: Mapping[str, Any], *, public: bool, throwaway: bool = False
) -> None:
    """Stop a sealed package that may not go where it is about to go.

    Args:
        manifest: Of the package.
        public: Everybody can read the registry.
        throwaway: The registry is removed after one rehearsal; see `is_throwaway`.

    Raises:
        RecipeError: Its licence does not allow it, or its weights are a rehearsal's random ones.
    """
    if manifest["source"]["random"]:
        if throwaway:
            return
        fault = (
            "this is a rehearsal: its weights are random, so only the throw-away registry of "
            "`enginesmith rehearse` takes it; build the recipe itself to publish an engine"
        )
        raise RecipeError([Fault("registry", fault)])
    licence = manifest["licence"]
    terms = Licence(spdx=licence["spdx"], redistribution=licence["redistribution"])
    require_publishable(terms, public=public)


def mark_throwaway(registry_dir: Path) -> None:
    """Make a registry folder one that takes packages of random weights."""
    registry_dir.mkdir(parents=True, exist_ok=True)
    (registry_dir / _MARK).touch()


def is_throwaway(registry_dir: Path) -> bool:
    """Whether a registry folder takes packages of random weights."""
    return (registry_dir / _MARK).exists()
