"""A registry over any store: S3, an OCI registry, a folder that is mounted.

Packages are sealed, and read, in this machine's cache:

    $ENGINESMITH_CACHE/packages/<digest>/           shared with `enginesmith pull`
    $ENGINESMITH_CACHE/registries/<store>/...       what the store's statements said when last read
    $ENGINESMITH_CACHE/staging/                     packages that take shape; empty between runs

What comes from the store is believed only after every byte was compared with its digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic.dataclasses import dataclass

from pipeline.core.cache import cache_root, locked
from pipeline.core.errors import CorruptError, NotFoundError
from pipeline.core.kinds import OneOf
from pipeline.core.settings import STRICT, PathField
from pipeline.core.values import Package, Reference
from pipeline.registry import catalogue
from pipeline.registry.backend import NOTHING, Entry
from pipeline.registry.client.cache import PackageCache
from pipeline.registry.client.download import PACKAGE, Transfer, download, files_of
from pipeline.registry.client.examine import fetch_statements
from pipeline.registry.client.owned import owned_folder
from pipeline.registry.client.progress import byte_progress
from pipeline.registry.disk import disk_errors
from pipeline.registry.manifest import MANIFEST, digest_bytes
from pipeline.registry.package import verify
from pipeline.registry.policy import require_manifest_publishable
from pipeline.registry.reference import (
    STATEMENTS_SUFFIX,
    check_part,
    numbered,
    rebuild_of,
    reference_of,
)
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.staging import private_folder
from pipeline.registry.statements import Statement, read_statements
from pipeline.registry.stores.store import Place, Store, WritableStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StoredRegistry:
    """`pipeline.registry.backend.Registry`, over a store.

    Attributes:
        store: Where the packages lie.
        cache_dir: The user's cache if None.
    """

    store: Annotated[WritableStore, OneOf("pipeline.registry.stores", "store")]
    cache_dir: PathField | None = None

    @property
    def public(self) -> bool:
        return self.store.public

    @property
    def local(self) -> bool:
        return self.store.local

    @property
    def cache(self) -> Path:
        """The folder that packages pass through."""
        return (self.cache_dir or cache_root()).absolute()

    def check_writable(self) -> None:
        self.store.check_writable()

    def find(self, name: str, variant: str, build_key: str) -> Iterator[Package]:
        return catalogue.find_builds(self, name, variant, build_key)

    def next_version(self, name: str, variant: str, version: str) -> str:
        base = check_part("version", rebuild_of(version)[1])
        taken = set(self.store.versions(name, variant))
        number = 1
        while numbered(base, number) in taken:
            number += 1
        return numbered(base, number)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        with contextlib.ExitStack() as stack:
            with disk_errors(f"prepare a package in {self.cache}", "ENGINESMITH_CACHE"):
                folder = stack.enter_context(private_folder(self.cache / "staging"))
            yield folder

    def publish(
        self, package: Package, statements: Mapping[str, Mapping[str, bytes]] = NOTHING
    ) -> Reference:
        require_manifest_publishable(package.manifest, public=self.public)
        reference = reference_of(package)
        size_bytes = sum(file["size"] for file in package.manifest["files"])
        with byte_progress(f"Publishing {reference}", size_bytes) as on_bytes:
            new = self.store.put_package(package, statements, on_bytes)
        require_readable(self.store, package)
        said = "Published %s" if new else "%s is already published with these bytes"
        log.info(said, self.where(Place.of(reference)))
        if package.dir.parent == self.cache / "staging":
            # What was just read back need not be fetched to be used here.
            with disk_errors(f"keep {reference} in {self.cache}", "ENGINESMITH_CACHE"):
                PackageCache(root=self.cache).keep(package.dir, package.digest)
        return reference

    def add_statement(
        self, reference: Reference, name: str, files: Mapping[str, bytes | Path]
    ) -> Path:
        contents = catalogue.statement_bytes(reference, name, files)
        catalogue.require_published(self.store, reference)
        self.store.put_statement(Place.of(reference), name, contents)
        return self.statements_dir(reference) / name

    def statements_dir(self, reference: Reference) -> Path:
        return self._statements_dir(Place.of(reference))

    def resolve(
        self, text: str, card: str | None = None, policy: TrustPolicy | None = None
    ) -> Package:
        return catalogue.resolve(self, text, card, policy)

    def entry(self, text: str, card: str | None = None, policy: TrustPolicy | None = None) -> Entry:
        return catalogue.entry(self, text, card, policy)

    def entries(self, policy: TrustPolicy | None = None) -> list[Entry]:
        return catalogue.entries(self, policy)

    def package(self, place: Place) -> Package:
        """See `pipeline.registry.catalogue.Holder`, like what follows."""
        return fetch_package(self.store, place, PackageCache(root=self.cache))

    def facts(self, place: Place, *, deep: bool) -> catalogue.Facts:
        manifest, digest = catalogue.manifest_at(self.store, place)
        return catalogue.Facts(manifest=manifest, digest=digest)

    def statements(self, place: Place) -> Sequence[Statement]:
        return read_statements(self._statements_dir(place))

    def made_s(self, place: Place) -> float:
        # The oldest statement is the signature, which came with the package.
        return min((one.made_s for one in self.store.statements(place)), default=0.0)

    def where(self, place: Place) -> str:
        return f"{self.store.url} {place}"

    def advice(self, place: Place) -> str:
        return "Find out who may write there"

    def _statements_dir(self, place: Place) -> Path:
        """A copy of the statements as the store has them now."""
        name = hashlib.sha256(self.store.url.encode()).hexdigest()[:16]
        parent = self.cache / "registries" / name / place.name / place.variant
        folder = parent / f"{place.version}{STATEMENTS_SUFFIX}"
        with (
            disk_errors(f"write {folder}", "ENGINESMITH_CACHE"),
            locked(parent / f".{place.version}.lock"),
            private_folder(self.cache / "staging") as private,
        ):
            # Afresh each time: what the store no longer has, or has otherwise, is not remembered.
            fetch_statements(self.store, place, private / "now", Transfer().retry)
            if _same_files(folder, private / "now"):
                return folder
            if folder.exists():
                folder.rename(private / "before")
            (private / "now").rename(folder)
        return folder


def fetch_package(store: Store, place: Place, cache: PackageCache) -> Package:
    """A package of a store in this machine's cache, every byte verified.

    Raises:
        NotFoundError: No such version.
        CorruptError: Its bytes are not what its manifest says.
        TransientError: The connection broke too often, or the disk is full.
    """
    manifest, digest = catalogue.manifest_at(store, place)
    entry = cache.entry(digest)
    with disk_errors(f"write {cache.dir}", "ENGINESMITH_CACHE"):
        cache.dir.mkdir(parents=True, exist_ok=True)
        with cache.lock(digest):
            if entry.is_dir():
                try:
                    return verify(entry)
                except CorruptError as error:
                    cache.quarantine(digest, error)
            with owned_folder(cache.dir, f".pull-{digest[:12]}-") as owned:
                files = files_of(manifest)
                (owned.dir / PACKAGE).mkdir()
                total = sum(file.size_bytes for file in files)
                with byte_progress(f"Fetching {place}", total) as on_bytes:
                    download(store, place, files, owned, digest, Transfer(), on_bytes)
                (owned.dir / PACKAGE / MANIFEST).write_bytes(store.read_manifest(place))
                # Again, and from the disk: the manifest could be another one by now.
                if verify(owned.dir / PACKAGE).digest != digest:
                    raise CorruptError(f"{store.url}: {place} changed while it was fetched")
                cache.keep(owned.dir / PACKAGE, digest)
    return Package(dir=entry, manifest=manifest, digest=digest)


def require_readable(store: Store, package: Package) -> None:
    """Read a package back as it lies in a store, keeping nothing.

    Raises:
        CorruptError: It is not what was published.
    """
    place = Place.of(reference_of(package))
    advice = "look after the store, then publish it again with --rebuild"
    try:
        if digest_bytes(store.read_manifest(place)) != package.digest:
            raise CorruptError(f"{store.url}: {place} does not read back; {advice}")
        for file in files_of(package.manifest):
            digest, size_bytes = hashlib.sha256(), 0
            with store.open_file(place, file) as chunks:
                for chunk in chunks:
                    digest.update(chunk)
                    size_bytes += len(chunk)
                    if size_bytes > file.size_bytes:
                        break
            if size_bytes != file.size_bytes or digest.hexdigest() != file.sha256:
                raise CorruptError(
                    f"{store.url}: {file.path} of {place} does not read back as it was sent; "
                    f"{advice}"
                )
    except NotFoundError as error:
        raise CorruptError(f"{store.url}: {place} does not read back ({error}); {advice}") from (
            error
        )


def _same_files(left: Path, right: Path) -> bool:
    """Whether two folders of statements have the same content and times."""

    def contents(folder: Path) -> dict[str, object]:
        return {
            path.relative_to(folder).as_posix(): path.stat().st_mtime
            if path.is_dir()
            else path.read_bytes()
            for path in folder.rglob("*")
        }

    return left.is_dir() and contents(left) == contents(right)


KIND = StoredRegistry
