"""Yank a version: it stays where it is, and nobody gets it by accident any more.

    <version>.statements/yank-000001/yank.dsse.json    signed; the highest number counts

A reader refuses a yanked package (exit 5, as it refuses a revoked one: whoever may speak for it
says not to use it). Who must have it all the same names it by digest and says `--allow-yanked`.
Undoing a yank is a yank with a higher number that says `false`.

Unlike a move of a channel, a yank that nobody trusted signed is left out, with a warning: else
anybody who may write there could stop any package, and undo any yank.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.core.errors import ConflictError, Fault, NotFoundError, RecipeError, UntrustedError
from pipeline.core.values import Reference
from pipeline.registry.disk import read_bounded
from pipeline.registry.lifecycle.records import Author, Yank, now, read_yank, sign_record
from pipeline.registry.manifest import digest_bytes
from pipeline.registry.reference import rebuild_of
from pipeline.registry.signing.envelope import MAX_ENVELOPE_BYTES
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.stores.store import Place, Store, WritableStore

log = logging.getLogger(__name__)

YANK_ENVELOPE = "yank.dsse.json"
_NAME = re.compile(r"yank-(?P<seq>[0-9]{6,9})")
_TRIES = 5


def is_yank(statement: str) -> bool:
    """Whether a statement of this name may be a yank."""
    return _NAME.fullmatch(statement) is not None


def yanked(
    statements: Mapping[str, Mapping[str, bytes]], digest: str, policy: TrustPolicy
) -> Yank | None:
    """Whether a package is yanked now; pure.

    Args:
        statements: Name -> its files; those that are no yanks are left out.
        digest: The package's.
        policy: Whose yanks count.

    Returns:
        The yank that counts; None if there is none, or if it was undone.
    """
    latest = _latest(statements, digest, policy)
    return latest if latest is not None and latest.yanked else None


def read_yank_of(store: Store, reference: Reference, policy: TrustPolicy) -> Yank | None:
    """Whether a published package is yanked now; reads nothing but its yanks."""
    return yanked(_read(store, Place.of(reference)), reference.digest, policy)


def read_yank_in(folders: Iterable[Path], digest: str, policy: TrustPolicy) -> Yank | None:
    """Whether a package is yanked now, by statements that lie in folders of this machine.

    Args:
        folders: One per statement, by its name; those that are no yanks are left out.
        digest: The package's.
        policy: Whose yanks count.
    """
    held: dict[str, dict[str, bytes]] = {}
    for folder in folders:
        path = folder / YANK_ENVELOPE
        if is_yank(folder.name):
            there = path.is_file() and not path.is_symlink()
            held[folder.name] = (
                {YANK_ENVELOPE: read_bounded(path, MAX_ENVELOPE_BYTES)} if there else {}
            )
    return yanked(held, digest, policy)


def require_not_yanked(yank: Yank | None, *, allowed: bool = False) -> None:
    """Refuse a yanked package.

    Args:
        yank: From `yanked`.
        allowed: It was named by digest, and `--allow-yanked` was said.

    Raises:
        UntrustedError: It is yanked; says by whom and why.
    """
    if yank is None:
        return
    if not allowed:
        raise UntrustedError(
            f"{yank.reference} was yanked {told(yank)}; use another version, "
            f"or name it as {yank.reference.name}@sha256:{yank.reference.digest} with "
            "--allow-yanked"
        )
    log.warning("%s was yanked %s; taken because of --allow-yanked", yank.reference, told(yank))


def require_build_not_yanked(
    store: Store, name: str, variant: str, version: str, policy: TrustPolicy
) -> None:
    """Refuse to build what was yanked; reads manifests and yanks, no other bytes.

    A rebuild that was not yanked stands for all.

    Args:
        store: Where it would be published.
        name: Of the package.
        variant: Of the package.
        version: Its first one, without the number of a rebuild.
        policy: Whose yanks count.

    Raises:
        UntrustedError: All packages of this build were yanked; says which one, by whom and why.
    """
    yank: Yank | None = None
    versions = [one for one in store.versions(name, variant) if rebuild_of(one)[1] == version]
    for found in sorted(versions, key=rebuild_of):
        place = Place(name=name, variant=variant, version=found)
        try:
            digest = digest_bytes(store.read_manifest(place))
        except NotFoundError:
            continue  # removed meanwhile
        reference = Reference(name=name, variant=variant, version=found, digest=digest)
        yank = read_yank_of(store, reference, policy)
        if yank is None:
            return
    if yank is not None:
        raise UntrustedError(
            f"{yank.reference} was yanked {told(yank)}; this recipe would build the same again, so "
            "nothing is built. Change the recipe and its version (version=...), take the yank back "
            f"with `enginesmith yank {yank.reference} --undo --registry {store.url}`, or build it "
            "once more beside the yanked one with --rebuild"
        )


def told(yank: Yank) -> str:
    """By whom, when and why, for people."""
    return f"by {yank.actor} at {yank.at}" + (f": {yank.reason}" if yank.reason else "")


def yank_package(
    store: WritableStore,
    reference: Reference,
    author: Author,
    policy: TrustPolicy,
    *,
    undo: bool = False,
) -> tuple[Yank, bool]:
    """Yank a package, or undo that; what is so already is a success.

    Args:
        store: Where it lies.
        reference: The package.
        author: Who; a yank needs a reason.
        policy: Must let the key sign channels.
        undo: Make it usable again.

    Returns:
        What counts now, and whether anything changed.

    Raises:
        UntrustedError: The key may not.
        NotFoundError: No such package.
        ConflictError: Others write yanks of it all the time.
        RecipeError: No reason, or an undo where nothing is yanked.
    """
    policy.require_may(author.key.public, "channels")
    if not undo and not author.reason:
        raise RecipeError([Fault("--reason", "say why, for those whose pull it stops")])
    place = Place.of(reference)
    for _ in range(_TRIES):
        held = _read(store, place)
        latest = _latest(held, reference.digest, policy)
        if latest is None and undo:
            raise RecipeError([Fault("--undo", f"{reference} is not yanked")])
        if latest is not None and latest.yanked is not undo:
            return latest, False
        yank = Yank(
            reference=reference,
            # Numbers that a stranger took are passed over.
            seq=max((_seq(name) for name in held), default=0) + 1,
            yanked=not undo,
            actor=author.actor,
            reason=author.reason,
            at=now(),
        )
        data = sign_record(yank, author.key)
        try:
            store.put_statement(place, f"yank-{yank.seq:06d}", {YANK_ENVELOPE: data})
        except ConflictError:
            continue  # somebody else yanks it, too: read again
        return read_yank(data, policy, str(reference)), True
    raise ConflictError(f"others yank {reference} at the same time; try again")


def _latest(
    statements: Mapping[str, Mapping[str, bytes]], digest: str, policy: TrustPolicy
) -> Yank | None:
    latest: Yank | None = None
    for name, files in statements.items():
        if not is_yank(name):
            continue
        try:
            yank = _signed(files, name, policy)
        except UntrustedError as error:
            log.warning("%s; it is left out", error)
            continue
        if yank.reference.digest != digest:
            log.warning("%s is of another package; it is left out", name)
        elif latest is None or yank.seq > latest.seq:
            latest = yank
    return latest


def _signed(files: Mapping[str, bytes], name: str, policy: TrustPolicy) -> Yank:
    if YANK_ENVELOPE not in files:
        raise UntrustedError(f"{name} has no {YANK_ENVELOPE}")
    return read_yank(files[YANK_ENVELOPE], policy, name)


def _read(store: Store, place: Place) -> dict[str, dict[str, bytes]]:
    names = [stored.name for stored in store.statements(place) if is_yank(stored.name)]
    return {name: store.read_statement(place, name) for name in names}


def _seq(name: str) -> int:
    match = _NAME.fullmatch(name)
    return int(match["seq"]) if match else 0
