"""Who may publish what where, and what may enter a channel: pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import Fault, NotAcceptedError, RecipeError, UntrustedError
from pipeline.core.values import PASSING, Licence

if TYPE_CHECKING:
    from pipeline.registry.signing.verification import SignedVerdict, Verification

_MARK = ".rehearsal"
"""Top-level file of a registry that is removed after one rehearsal."""


def publish_faults(
    licence: Licence, *, public: bool, throwaway: bool = False, random_weights: bool = False
) -> Iterator[Fault]:
    """Why a package must not be published; nothing if it may.

    Args:
        licence: Terms of the weights, as the recipe or the manifest states them.
        public: Everybody can read the registry.
        throwaway: The registry is made for one rehearsal and removed after it.
        random_weights: The package was rehearsed: its weights are nobody's, and of no use.
    """
    if random_weights:
        if not throwaway:
            yield Fault(
                "registry",
                "this is a rehearsal: its weights are random, so only the throw-away registry of "
                "`enginesmith rehearse` takes it; build the recipe itself to publish an engine",
            )
        return
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


def require_publishable(
    licence: Licence, *, public: bool, throwaway: bool = False, random_weights: bool = False
) -> None:
    """Stop a build, before any download, whose package could not be published.

    Raises:
        RecipeError: With all faults of `publish_faults`.
    """
    faults = tuple(
        publish_faults(licence, public=public, throwaway=throwaway, random_weights=random_weights)
    )
    if faults:
        raise RecipeError(faults)


def require_no_rehearsal(manifest: Mapping[str, Any], registry_dir: Path) -> None:
    """Stop a package of random weights at the door of a registry that is not a rehearsal's own.

    Raises:
        RecipeError: It is one.
    """
    require_publishable(
        Licence(spdx=manifest["licence"]["spdx"]),
        public=False,
        throwaway=(registry_dir / _MARK).exists(),
        random_weights=manifest["source"].get("weights") == "random",
    )


def require_manifest_publishable(manifest: Mapping[str, Any], *, public: bool) -> None:
    """Stop a sealed package that may not go where it is about to go.

    Raises:
        RecipeError: Its licence does not allow it, or it is a rehearsal.
    """
    licence = manifest["licence"]
    require_publishable(
        Licence(spdx=licence["spdx"], redistribution=licence.get("redistribution", "forbidden")),
        public=public,
        random_weights=manifest["source"].get("weights") == "random",
    )


def require_enterable(verification: Verification, channel: str, card: str) -> SignedVerdict:
    """Stop a package at the door of a channel that it has not earned for this card.

    What counts is the newest verdict for the card that a trusted key signed: `stable` takes
    `accepted`, every other channel `checked` and `compiled` too.

    Returns:
        That verdict.

    Raises:
        UntrustedError: The package is unsigned, or has no signed verdict for this card.
        NotAcceptedError: The verdict does not suffice.
    """
    reference = "/".join(str(verification.package.manifest[part]) for part in ("name", "variant"))
    what = (
        f"{reference}:{verification.package.manifest['version']} may not enter {channel} of {card}"
    )
    if verification.signer is None:
        raise UntrustedError(f"{what}: nobody signed it; build it again with a key")
    found = verification.verdict(card)
    if found is None:
        raise UntrustedError(
            f"{what}: it has no signed test result for this card; run enginesmith accept there"
        )
    wanted = {"accepted"} if channel == "stable" else PASSING
    if found.verdict not in wanted:
        raise NotAcceptedError(
            f"{what}: its newest signed verdict is {found.verdict}, and it needs "
            f"{' or '.join(sorted(wanted))}"
        )
    return found


def mark_throwaway(registry_dir: Path) -> None:
    """Make a registry folder one that takes packages of random weights."""
    registry_dir.mkdir(parents=True, exist_ok=True)
    (registry_dir / _MARK).touch()
