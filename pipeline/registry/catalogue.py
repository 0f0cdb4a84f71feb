"""Which packages a registry has, and which one a reference means: the same for every store."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.core.errors import ConflictError, CorruptError, NotFoundError
from pipeline.core.values import Package, Reference
from pipeline.registry.backend import Entry
from pipeline.registry.lifecycle.pointers import pointers
from pipeline.registry.lifecycle.yank import read_yank_in, told
from pipeline.registry.lookup import Choice, Shelf, choose, no_such_name
from pipeline.registry.manifest import MANIFEST, digest_bytes, parse_manifest
from pipeline.registry.reference import (
    ParsedReference,
    check_part,
    parse_reference,
    rebuild_of,
    reference_of,
)
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.statements import (
    REPORT,
    Pointer,
    Statement,
    report_digest,
)
from pipeline.registry.stores.store import Place, Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a registry knows of a version without being asked for its files.

    Attributes:
        manifest: Checked; of this place.
        digest: Of the manifest.
    """

    manifest: Mapping[str, Any]
    digest: str


class Holder(Protocol):
    """A registry, as far as its catalogue needs it."""

    @property
    def store(self) -> Store:
        """Where the packages lie."""
        ...

    def package(self, place: Place) -> Package:
        """A package in a folder of this machine, every byte verified.

        Raises:
            CorruptError: It is damaged, or not what its place says.
        """
        ...

    def facts(self, place: Place, *, deep: bool) -> Facts:
        """What can be known without moving a package; `deep` reads every byte that lies here.

        Raises:
            CorruptError: As in `package`.
        """
        ...

    def statements(self, place: Place) -> Sequence[Statement]:
        """What was said about it, newest first."""
        ...

    def made_s(self, place: Place) -> float:
        """When it was published, Unix time; 0 if nothing tells."""
        ...

    def where(self, place: Place) -> str:
        """Its folder or URL."""
        ...

    def advice(self, place: Place) -> str:
        """What to do about a damaged version."""
        ...


def find_builds(holder: Holder, name: str, variant: str, build_key: str) -> Iterator[Package]:
    """As `Registry.find`."""
    for version in sorted(holder.store.versions(name, variant), key=rebuild_of, reverse=True):
        place = Place(name=name, variant=variant, version=version)
        # Versions carry the start of their build key: it still tells whose they are when the
        # manifest cannot be read.
        ours = build_key[:12] in version
        try:
            manifest = manifest_at(holder.store, place)[0]
            ours = manifest["build_key"] == build_key
            if ours:
                yield holder.package(place)
        except NotFoundError:
            continue  # removed meanwhile
        except CorruptError as error:
            if ours:
                log.warning("%s; it is not taken. %s", error, holder.advice(place))


def resolve(
    holder: Holder, text: str, card: str | None, policy: TrustPolicy | None = None
) -> Package:
    """As `Registry.resolve`."""
    place, digest = find_place(holder.store, text, card, policy)
    package = holder.package(place)
    if digest not in {None, package.digest}:
        raise CorruptError(
            f"{text} must have digest {digest}, {holder.where(place)} has {package.digest}; "
            "publish it again"
        )
    return package


def entry(holder: Holder, text: str, card: str | None, policy: TrustPolicy | None = None) -> Entry:
    """As `Registry.entry`."""
    trust = trust_of(holder.store, policy)
    place, _ = find_place(holder.store, text, card, trust)
    channels = pointers(holder.store, trust, place.name, place.variant)
    return _entry(holder, place, channels, trust, deep=True)


def entries(holder: Holder, policy: TrustPolicy | None = None) -> list[Entry]:
    """As `Registry.entries`."""
    trust = trust_of(holder.store, policy)
    found = []
    for name in holder.store.names():
        for variant in holder.store.variants(name):
            channels = pointers(holder.store, trust, name, variant)
            places = (
                Place(name=name, variant=variant, version=version)
                for version in holder.store.versions(name, variant)
            )
            of_variant = [_entry(holder, place, channels, trust, deep=False) for place in places]
            found += sorted(of_variant, key=lambda one: (-one.made_s, one.version))
    return found


def trust_of(store: Store, policy: TrustPolicy | None) -> TrustPolicy:
    """Whose moves of channels, and whose yanks, count: this machine's policy if none is given."""
    if policy is not None:
        return policy
    from pipeline.registry.signing.machine import machine_trust

    return machine_trust(os.environ, own_folder=store.local)


def find_place(
    store: Store, text: str, card: str | None, policy: TrustPolicy | None = None
) -> tuple[Place, str | None]:
    """The published version that a reference means, and the digest that it must have.

    Args:
        store: Where to look.
        text: What the user typed.
        card: Only channels of this card; None for all.
        policy: Whose moves of channels count; None for this machine's.

    Raises:
        UntrustedError: It names a channel whose log cannot be believed.
        RecipeError: Not a reference, or it names several packages; lists them.
        NotFoundError: It names none; says what there is.
    """
    wanted = parse_reference(text)
    choice = _choose(store, wanted, card, policy)
    place = Place(name=wanted.name, variant=choice.variant, version=choice.version)
    return place, choice.digest


def manifest_at(store: Store, place: Place) -> tuple[dict[str, Any], str]:
    """The checked manifest of a version, and its digest.

    Raises:
        NotFoundError: No such version.
        CorruptError: It is no manifest, or that of another place.
    """
    data = store.read_manifest(place)
    origin = f"{store.url}/{place.name}/{place.variant}/{place.version}/{MANIFEST}"
    manifest = parse_manifest(data, origin)
    require_place(Package(dir=Path(), manifest=manifest, digest=digest_bytes(data)), place)
    return manifest, digest_bytes(data)


def require_place(package: Package, place: Place) -> None:
    """Check that a package says of itself what its place says.

    Raises:
        CorruptError: It is another one.
    """
    reference = reference_of(package)
    if Place.of(reference) != place:
        raise CorruptError(f"{place} holds {reference}, not what its path says; move it back")


def statement_bytes(
    reference: Reference, name: str, files: Mapping[str, bytes | Path]
) -> dict[str, bytes]:
    """The files of a statement that is about to be added.

    Raises:
        CorruptError: Its report speaks of another package.
        RecipeError: A name breaks the grammar of references.
    """
    check_part("statement", name)
    contents = {
        check_part("statement", file): data if isinstance(data, bytes) else data.read_bytes()
        for file, data in files.items()
    }
    if not contents:
        raise ValueError(f"statement {name} has no files")
    if REPORT in contents and report_digest(contents[REPORT]) != reference.digest:
        raise CorruptError(f"{REPORT} of {name} speaks of another package than {reference}")
    return contents


def require_published(store: Store, reference: Reference) -> None:
    """Check that a store has exactly this package.

    Raises:
        NotFoundError: It has no such version.
        ConflictError: It has other bytes under this version.
    """
    place = Place.of(reference)
    try:
        digest = digest_bytes(store.read_manifest(place))
    except NotFoundError:
        raise NotFoundError(f"{store.url} has no {place}; publish it first") from None
    if digest != reference.digest:
        raise ConflictError(f"{store.url}: {place} has digest {digest}, not {reference.digest}")


def _choose(
    store: Store, wanted: ParsedReference, card: str | None, policy: TrustPolicy | None
) -> Choice:
    versions = {
        variant: held
        for variant in store.variants(wanted.name)
        if (held := store.versions(wanted.name, variant))
    }
    if not versions:
        raise no_such_name(wanted.name, store.names(), store.url)
    if wanted.digest is not None:
        return _with_digest(store, wanted, versions)
    channels = []
    if wanted.channel is not None:
        trust = trust_of(store, policy)
        for variant in versions:
            if wanted.variant in {None, variant}:
                channels += pointers(store, trust, wanted.name, variant, wanted.channel)
    choice = choose(wanted, Shelf(name=wanted.name, versions=versions, pointers=channels), card)
    if choice.version not in versions[choice.variant]:
        raise NotFoundError(
            f"{wanted} points to {wanted.name}/{choice.variant}:{choice.version}, "
            "which is gone; publish it again or name another version"
        )
    return choice


def _with_digest(
    store: Store, wanted: ParsedReference, versions: Mapping[str, Sequence[str]]
) -> Choice:
    for variant, held in versions.items():
        for version in held if wanted.variant in {None, variant} else ():
            place = Place(name=wanted.name, variant=variant, version=version)
            with contextlib.suppress(CorruptError):
                if digest_bytes(store.read_manifest(place)) == wanted.digest:
                    return Choice(variant=variant, version=version, digest=wanted.digest)
    raise NotFoundError(
        f"{store.url} has no package {wanted}; `enginesmith list` shows what there is"
    )


def _entry(
    holder: Holder, place: Place, channels: Sequence[Pointer], trust: TrustPolicy, *, deep: bool
) -> Entry:
    facts, fault = None, ""
    try:
        facts = holder.facts(place, deep=deep)
    except CorruptError as error:
        fault = str(error)
    digest = facts.digest if facts else None
    said = holder.statements(place)
    yank = read_yank_in((found.dir for found in said), digest, trust) if digest else None
    return Entry(
        name=place.name,
        variant=place.variant,
        version=place.version,
        made_s=holder.made_s(place),
        where=holder.where(place),
        manifest=facts.manifest if facts else None,
        digest=digest,
        fault=fault,
        yanked=told(yank) if yank else "",
        statements=tuple(found for found in said if found.digest in {"", digest}),
        channels=tuple(found for found in channels if found.reference.version == place.version),
    )
