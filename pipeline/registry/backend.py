"""What every registry can do, wherever it keeps its packages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from pipeline.core.values import Package, Reference, VerdictName
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.statements import Pointer, Statement
from pipeline.registry.stores.store import WritableStore

NOTHING: Mapping[str, Mapping[str, bytes]] = MappingProxyType({})
"""No statements."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One published version, for people.

    Attributes:
        name: Recipe.
        variant: Format, precision, shape and SM or card.
        version: Immutable version.
        made_s: When it was published, Unix time; 0 if nothing tells.
        where: Its folder or URL, for people.
        manifest: None if it is damaged.
        digest: Of its manifest; None if it is damaged.
        fault: Why it is damaged; empty if it is not.
        yanked: By whom, when and why, by a signed yank that counts here; empty if it is not.
        statements: What was said about exactly these bytes, newest first.
        channels: Those that point to it.
    """

    name: str
    variant: str
    version: str
    made_s: float
    where: str
    manifest: Mapping[str, Any] | None
    digest: str | None
    fault: str
    yanked: str = ""
    statements: tuple[Statement, ...]
    channels: tuple[Pointer, ...]

    @property
    def size_bytes(self) -> int:
        """Size of all engine files; 0 if the manifest cannot be read."""
        return sum(file["size"] for file in self.manifest["files"]) if self.manifest else 0

    @property
    def reference(self) -> Reference | None:
        """The full reference; None if it is damaged."""
        if self.digest is None:
            return None
        return Reference(
            name=self.name, variant=self.variant, version=self.version, digest=self.digest
        )

    @property
    def verdict(self) -> VerdictName | None:
        """The newest one, whatever card it is for."""
        verdicts = (found.verdict for found in self.statements if found.verdict is not None)
        return next(verdicts, None)


@runtime_checkable
class Registry(Protocol):
    """Keeps immutable packages, statements about them, and channels that point to them."""

    @property
    def store(self) -> WritableStore:
        """Where the packages lie; channels move there by `pipeline.registry.lifecycle`."""
        ...

    @property
    def public(self) -> bool:
        """Whether everybody can read what is published here."""
        ...

    @property
    def local(self) -> bool:
        """Whether it is a folder of this machine: only there a local key counts."""
        ...

    def check_writable(self) -> None:
        """Find out, before any work, whether packages can be published here; leaves no trace.

        Raises:
            AccessError: They cannot; says what to change.
        """
        ...

    def find(self, name: str, variant: str, build_key: str) -> Iterator[Package]:
        """The published packages of this build, every byte verified; the newest rebuild first.

        A damaged one is named in a warning and left out. Signatures are the caller's to check.
        """
        ...

    def next_version(self, name: str, variant: str, version: str) -> str:
        """The first free one of `version`, `version.r2`, `version.r3`, ..."""
        ...

    def staging(self) -> AbstractContextManager[Path]:
        """A private, empty folder to seal a package in; gone after the block."""
        ...

    def publish(
        self, package: Package, statements: Mapping[str, Mapping[str, bytes]] = NOTHING
    ) -> Reference:
        """Make a sealed package visible, whole and for ever; the same digest again is a success.

        Args:
            package: From `seal`, in a folder from `staging`.
            statements: Name -> its files; such as the signatures. They are there before the
                package shows. One whose name is taken stays as it is, and a package that is
                published already gets none.

        Raises:
            ConflictError: Its version holds other bytes; nothing was overwritten.
            CorruptError: It is not what was sealed.
            AccessError: Not writable.
            TransientError: No space.
        """
        ...

    def add_statement(
        self, reference: Reference, name: str, files: Mapping[str, bytes | Path]
    ) -> Path:
        """Add a statement about a published package; the same bytes again are a success.

        Args:
            reference: The package; never touched.
            name: Name of the statement.
            files: File name -> content, or the file to copy. A `report.json` must name the package.

        Returns:
            Where it lies.

        Raises:
            ConflictError: Other bytes are there under this name.
            NotFoundError: No such package.
            CorruptError: Its report speaks of another package.
        """
        ...

    def statements_dir(self, reference: Reference) -> Path:
        """A folder of this machine with everything that was said about a package, by now."""
        ...

    def resolve(
        self, text: str, card: str | None = None, policy: TrustPolicy | None = None
    ) -> Package:
        """The package that a reference names, every byte verified.

        Args:
            text: What the user typed.
            card: Looks only at this card's channels; None for all cards.
            policy: Whose moves of channels count; None for this machine's.

        Raises:
            RecipeError: Not a reference, or it names several packages; lists them.
            NotFoundError: It names none; says what there is.
            CorruptError: The package is damaged.
            UntrustedError: It names a channel whose log cannot be believed.
        """
        ...

    def entry(self, text: str, card: str | None = None, policy: TrustPolicy | None = None) -> Entry:
        """What is known of the package that a reference names, damaged or not.

        Raises:
            RecipeError: As in `resolve`.
            NotFoundError: As in `resolve`.
            UntrustedError: As in `resolve`.
        """
        ...

    def entries(self, policy: TrustPolicy | None = None) -> list[Entry]:
        """All published versions; damaged ones carry their fault. Sizes are checked, not bytes."""
        ...
