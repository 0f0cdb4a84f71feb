"""Manifest and signatures of an offered version: all that is asked before a large byte moves."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.core.errors import CorruptError, NotFoundError, RecipeError, UntrustedError
from pipeline.core.values import Package
from pipeline.registry.client.resolve import Offer
from pipeline.registry.client.retry import Retry, insistently
from pipeline.registry.client.select import Candidate
from pipeline.registry.disk import write_new
from pipeline.registry.lifecycle.yank import read_yank_in, require_not_yanked
from pipeline.registry.manifest import digest_bytes, parse_manifest
from pipeline.registry.reference import check_part
from pipeline.registry.signing.signer import MANIFEST_ENVELOPE
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.signing.verification import Verification, verify_signatures
from pipeline.registry.stores.store import Place, Store

log = logging.getLogger(__name__)

_MAX_STATEMENTS = 1000
"""Some ten are usual: two signatures, and one result per card and acceptance."""
_MAX_STATEMENTS_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Belief:
    """What is believed.

    Attributes:
        policy: Who may sign what.
        allow_unsigned: Take what nobody signed.
        allow_yanked: Take what was yanked; only for a package that is named by its digest.
        signature_wait_s: How long to wait for the signature of a package that has none yet:
            copies of registries may bring it later.
    """

    policy: TrustPolicy
    allow_unsigned: bool = False
    allow_yanked: bool = False
    signature_wait_s: float = 0.0


def examine(
    store: Store, offer: Offer, belief: Belief, retry: Retry, statements_dir: Path
) -> Candidate:
    """Read and verify what a version says of itself, and what was said about it.

    Args:
        store: Where it lies.
        offer: The version.
        belief: Whom to believe.
        retry: How long to insist.
        statements_dir: Private; made, and filled with the statements as they lie in the store.

    Raises:
        CorruptError: The manifest is damaged, or not the one that was pointed to.
        UntrustedError: Not signed by somebody who may, revoked, or yanked.
        NotFoundError: It is gone.
    """
    place = offer.place
    data = insistently(lambda: store.read_manifest(place), retry)
    digest = digest_bytes(data)
    origin = f"{store.url}: {place}"
    if offer.digest not in {None, digest}:
        raise CorruptError(
            f"{origin} has digest {digest[:12]}, wanted {str(offer.digest)[:12]}: it was changed "
            "after it was published; publish it again"
        )
    manifest = parse_manifest(data, origin)
    said = Place(**{part: str(manifest[part]) for part in ("name", "variant", "version")})
    if said != place:
        raise CorruptError(f"{origin} holds {said}, not what its path says; publish it again")
    package = Package(dir=Path(str(place)), manifest=manifest, digest=digest)
    fetch_statements(store, place, statements_dir, retry)
    verification = _believed(store, package, belief, retry, statements_dir)
    yank = read_yank_in(statements_dir.iterdir(), digest, belief.policy)
    require_not_yanked(yank, allowed=belief.allow_yanked)
    return Candidate(
        offer=offer,
        package=package,
        data=data,
        verification=verification,
        statements_dir=statements_dir,
        yank=yank,
    )


def _believed(
    store: Store, package: Package, belief: Belief, retry: Retry, statements_dir: Path
) -> Verification:
    ends_s = time.monotonic() + (0.0 if store.local else belief.signature_wait_s)
    while True:
        try:
            return verify_signatures(
                package, statements_dir, belief.policy, allow_unsigned=belief.allow_unsigned
            )
        except UntrustedError:
            late = not any(statements_dir.glob(f"*/{MANIFEST_ENVELOPE}"))
            if not late or time.monotonic() >= ends_s:
                raise
        time.sleep(1.0)
        fetch_statements(store, _place_of(package), statements_dir, retry)


def _place_of(package: Package) -> Place:
    return Place(**{part: str(package.manifest[part]) for part in ("name", "variant", "version")})


def fetch_statements(store: Store, place: Place, folder: Path, retry: Retry) -> None:
    """Copy the statements about a version into `folder`; what is there already stays.

    Their times are kept: the newest verdict on a card is the one that counts.

    Raises:
        CorruptError: There are more, or larger ones, than anybody needs.
    """
    folder.mkdir(exist_ok=True)
    stored = insistently(lambda: store.statements(place), retry)
    size_bytes = sum(sum(one.sizes.values()) for one in stored)
    if len(stored) > _MAX_STATEMENTS or size_bytes > _MAX_STATEMENTS_BYTES:
        raise CorruptError(
            f"{store.url}: {place} has {len(stored)} statements of {size_bytes} bytes; at most "
            f"{_MAX_STATEMENTS} of {_MAX_STATEMENTS_BYTES} are read; see who writes there"
        )
    for one in stored:
        name = one.name
        try:
            target = folder / check_part("statement", name)
            if target.exists():
                continue
            with contextlib.suppress(NotFoundError):  # removed meanwhile
                files = insistently(partial(store.read_statement, place, name), retry)
                contents = {check_part("statement", file): data for file, data in files.items()}
                target.mkdir()
                for file, data in contents.items():
                    write_new(target / file, data)
                os.utime(target, (one.made_s, one.made_s))
        except RecipeError as error:
            log.warning("%s: a statement about %s is left out: %s", store.url, place, error)
