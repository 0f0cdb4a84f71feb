"""A registry in a folder; how the tree looks, `pipeline.registry.stores.folder` tells.

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

from pipeline.core.errors import CorruptError
from pipeline.core.settings import STRICT, PathField
from pipeline.core.values import Package, Reference
from pipeline.registry import catalogue
from pipeline.registry.backend import NOTHING, Entry
from pipeline.registry.disk import disk_errors
from pipeline.registry.package import verify
from pipeline.registry.policy import require_no_rehearsal
from pipeline.registry.reference import check_part, numbered, rebuild_of, reference_of
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.statements import Statement, read_statements
from pipeline.registry.stores.folder import FolderStore
from pipeline.registry.stores.store import Place

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

    def resolve(
        self, text: str, card: str | None = None, policy: TrustPolicy | None = None
    ) -> Package:
        with disk_errors(f"read {self.path}"):
            return catalogue.resolve(self, text, card, policy)

    def entry(self, text: str, card: str | None = None, policy: TrustPolicy | None = None) -> Entry:
        with disk_errors(f"read {self.path}"):
            return catalogue.entry(self, text, card, policy)

    def entries(self, policy: TrustPolicy | None = None) -> list[Entry]:
        with disk_errors(f"read {self.path}"):
            return catalogue.entries(self, policy)

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


KIND = FolderRegistry
