"""Whether what lies at a place is signed, and good enough for a channel.

The engine's bytes are not read here: the manifest that is signed names the SHA-256 of each file,
and whoever pulls checks every byte against it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import CorruptError, Fault, RecipeError, UntrustedError
from pipeline.core.values import Package, Reference
from pipeline.registry.lifecycle.yank import read_yank_of, require_not_yanked
from pipeline.registry.manifest import digest_bytes, parse_manifest
from pipeline.registry.policy import require_enterable
from pipeline.registry.reference import STATEMENTS_SUFFIX
from pipeline.registry.signing.model_signature import MODEL_SIGNATURE
from pipeline.registry.signing.signer import (
    MANIFEST_ENVELOPE,
    PROVENANCE_ENVELOPE,
    TEST_RESULT_ENVELOPE,
)
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.signing.verification import (
    SignedVerdict,
    Verification,
    verify_signatures,
)
from pipeline.registry.statements import REPORT
from pipeline.registry.stores.store import Place, Store

_READ = {
    MANIFEST_ENVELOPE,
    PROVENANCE_ENVELOPE,
    TEST_RESULT_ENVELOPE,
    MODEL_SIGNATURE,
    REPORT,
}
"""What the verification of signatures looks at."""


def examine(store: Store, reference: Reference, policy: TrustPolicy) -> Verification:
    """Check the signatures over a published manifest, and all verdicts about it.

    Args:
        store: Where it lies.
        reference: The package, with the digest that it must have.
        policy: Whom to believe.

    Returns:
        What holds; `package.dir` is gone by then.

    Raises:
        UntrustedError: Unsigned, revoked, or signed by nobody who may.
        CorruptError: Another digest than wanted, or changed after it was signed.
        NotFoundError: No such version.
    """
    place = Place.of(reference)
    manifest, digest = manifest_at(store, place)
    if digest != reference.digest:
        raise CorruptError(
            f"{store.url} {place} has digest {digest}, not {reference.digest}; it was changed "
            "after it was published, so publish it again under another version"
        )
    with tempfile.TemporaryDirectory(prefix="enginesmith-") as folder:
        there = Path(folder, place.version)
        package = Package(dir=there, manifest=manifest, digest=reference.digest)
        beside = there.with_name(f"{there.name}{STATEMENTS_SUFFIX}")
        with _named(folder, f"{store.url}/{place.name}/{place.variant}"):
            _fetch_statements(store, place, beside)
            return verify_signatures(package, beside, policy)


def manifest_at(store: Store, place: Place) -> tuple[dict[str, Any], str]:
    """The manifest of a version, and its digest; signatures are not looked at.

    Raises:
        NotFoundError: No such version.
        CorruptError: It is no manifest, or that of another place.
    """
    data = store.read_manifest(place)
    manifest = parse_manifest(data, f"{store.url} {place}")
    said = Place(**{part: manifest[part] for part in ("name", "variant", "version")})
    if said != place:
        raise CorruptError(f"{store.url} {place} holds {said}, not what its path says")
    return manifest, digest_bytes(data)


def require_admissible(
    store: Store, reference: Reference, policy: TrustPolicy, *, channel: str, card: str | None
) -> SignedVerdict:
    """The signed test result that lets a package into a channel.

    Reads what `pipeline.registry.policy.require_enterable` judges.

    Args:
        store: Where it lies.
        reference: The package.
        policy: Whom to believe.
        channel: Where it is to go.
        card: For which card; None for the only one that has a result.

    Raises:
        NotAcceptedError: The newest signed result for the card is not good enough.
        RecipeError: No card was named, and several have results; lists them.
        UntrustedError: Yanked, revoked, not signed by whom the policy believes, or without a
            signed result for the card.
        CorruptError: Changed.
        NotFoundError: No such version.
    """
    found = examine(store, reference, policy)
    require_not_yanked(read_yank_of(store, reference, policy))
    card = card or _only_card(found, reference)
    return require_enterable(found, channel, card)


def _only_card(found: Verification, reference: Reference) -> str:
    cards = sorted({verdict.card for verdict in found.verdicts})
    if not cards:
        raise UntrustedError(
            f"{reference} has no signed test result; run enginesmith accept on the card that it "
            "is for"
        )
    if len(cards) > 1:
        raise RecipeError(
            [Fault("--card", f"{reference} has results for {', '.join(cards)}; name one of them")]
        )
    return cards[0]


def _fetch_statements(store: Store, place: Place, folder: Path) -> None:
    """Lay the statements out as in a folder registry; their times order them."""
    for stored in store.statements(place):
        there = folder / stored.name
        there.mkdir(parents=True)
        for name, data in store.read_statement(place, stored.name).items():
            if name in _READ:
                (there / name).write_bytes(data)
        os.utime(there, (stored.made_s, stored.made_s))


@contextlib.contextmanager
def _named(folder: str, origin: str) -> Iterator[None]:
    """Errors of the block speak of where things came from, not of where they were laid out."""
    try:
        yield
    except (UntrustedError, CorruptError) as error:
        raise type(error)(str(error).replace(folder, origin)) from error
