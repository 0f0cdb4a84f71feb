"""A registry in a folder; how the tree looks, `pipeline.registry.stores.folder` tells.

Only channels take a lock, since only they move.

**Damage.** A published package that no longer verifies keeps its version: other people may hold the
good bytes under that name, and a rebuild would not have the same ones. So `find` warns and does not
take it, `next_version` gives the build the next free `.rN`, and nothing here deletes or moves it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic.dataclasses import dataclass

from pipeline.cache import locked
from pipeline.errors import CorruptError, PipelineError, UntrustedError
from pipeline.registry import catalogue
from pipeline.registry.backend import NOTHING, Entry
from pipeline.registry.disk import disk_errors, read_bounded
from pipeline.registry.manifest import MAX_MANIFEST_BYTES
from pipeline.registry.package import verify
from pipeline.registry.policy import require_no_rehearsal
from pipeline.registry.reference import check_part, numbered, rebuild_of, reference_of
from pipeline.registry.statements import Pointer, Statement, parse_pointer, read_statements
from pipeline.registry.stores.folder import FolderStore
from pipeline.registry.stores.store import Place
from pipeline.settings import STRICT, PathField
from pipeline.stages import Package, Reference

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FolderRegistry:
    """`pipeline.registry.backend.Registry`, in a folder.

    Attributes:
        path: The root; made when something is published.
    """

    public: ClassVar[bool] = False
    local: ClassVar[bool] = True

    path: PathField

    @property
    def store(self) -> FolderStore:
        """The tree."""
        return FolderStore(path=self.path)

    def check_writable(self) -> None:
        self.store.check_writable()

    def location(self, reference: Reference) -> Path:
        """The folder of a published package."""
        return self.store.location(Place.of(reference))

    def find(self, name: str, variant: str, build_key: str) -> Iterator[Package]:
        with disk_errors(f"look for a finished build in {self.path}"):
            yield from catalogue.find_builds(self, name, variant, build_key)

    def next_version(self, name: str, variant: str, version: str) -> str:
        base = check_part("version", rebuild_of(version)[1])
        number = 1
        while self.store.location(
            Place(name=name, variant=variant, version=(version := numbered(base, number)))
        ).exists():
            number += 1
        return version

    def staging(self) -> contextlib.AbstractContextManager[Path]:
        return self.store.staging()

    def publish(
        self, package: Package, statements: Mapping[str, Mapping[str, bytes]] = NOTHING
    ) -> Reference:
        require_no_rehearsal(package.manifest, self.path)
        reference = reference_of(package)
        new = self.store.put_package(package, statements)
        said = "Published %s" if new else "%s is already published with these bytes"
        log.info(said, self.location(reference))
        return reference

    def add_statement(
        self, reference: Reference, name: str, files: Mapping[str, bytes | Path]
    ) -> Path:
        check_part("statement", name)
        with disk_errors(f"write statement {name}"):
            catalogue.require_published(self.store, reference)
            contents = catalogue.statement_bytes(reference, name, files)
            self.store.put_statement(Place.of(reference), name, contents)
        return self.statements_dir(reference) / name

    def statements_dir(self, reference: Reference) -> Path:
        return self.store.statements_dir(Place.of(reference))

    def set_channel(self, reference: Reference, channel: str, card: str) -> None:
        check_part("channel", channel)
        check_part("card", card)
        if channel == "stable":
            raise UntrustedError(
                "stable takes only packages with a signed test result; use candidate"
            )
        catalogue.require_published(self.store, reference)
        self._check_passed(reference, card)
        lock = self.path / ".locks" / f"{reference.name}--{reference.variant}.lock"
        with disk_errors(f"set {channel} of {reference}"), locked(lock):
            pointer = Pointer(channel=channel, card=card, reference=reference, seq=1)
            path = pointer.path(self.path)
            if path.exists():
                data = read_bounded(path, MAX_MANIFEST_BYTES)
                current = parse_pointer(
                    data, reference.name, reference.variant, path.name, str(path)
                )
                if current.reference == reference:
                    return
                pointer = Pointer(
                    channel=channel, card=card, reference=reference, seq=current.seq + 1
                )
            self.store.put_channel(reference.name, reference.variant, path.name, pointer.to_bytes())
        log.info("%s of %s is now %s", channel, card, reference)

    def resolve(self, text: str, card: str | None = None) -> Package:
        with disk_errors(f"read {self.path}"):
            return catalogue.resolve(self, text, card)

    def entry(self, text: str, card: str | None = None) -> Entry:
        with disk_errors(f"read {self.path}"):
            return catalogue.entry(self, text, card)

    def entries(self) -> list[Entry]:
        with disk_errors(f"read {self.path}"):
            return catalogue.entries(self)

    def package(self, place: Place) -> Package:
        """See `pipeline.registry.catalogue.Holder`, like what follows."""
        return self._open(place, deep=True)

    def facts(self, place: Place, *, deep: bool) -> catalogue.Facts:
        package = self._open(place, deep=deep)
        return catalogue.Facts(manifest=package.manifest, digest=package.digest)

    def statements(self, place: Place) -> Sequence[Statement]:
        return read_statements(self.store.statements_dir(place))

    def made_s(self, place: Place) -> float:
        return self.store.location(place).stat().st_mtime

    def where(self, place: Place) -> str:
        return str(self.store.location(place))

    def advice(self, place: Place) -> str:
        return self.store.quarantine(place)

    def _open(self, place: Place, *, deep: bool) -> Package:
        folder = self.store.location(place)
        package = verify(folder, deep=deep)
        try:
            catalogue.require_place(package, place)
        except CorruptError as error:
            raise CorruptError(f"{folder}: {error}") from None
        return package

    def _check_passed(self, reference: Reference, card: str) -> None:
        """Raise unless the newest statement about this package on this card passed."""
        said = [
            found
            for found in self.statements(Place.of(reference))
            if found.digest == reference.digest and found.card == card and found.verdict
        ]
        if not said or not said[0].passed:
            verdict = f"its newest verdict is {said[0].verdict}" if said else "it has no statement"
            raise PipelineError(
                f"{reference} may not enter a channel of {card}: {verdict}; "
                "it needs accepted, checked or compiled"
            )
