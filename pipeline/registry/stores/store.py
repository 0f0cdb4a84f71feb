"""What every place that keeps packages can do, whatever its protocol.

A store moves bytes and makes names exclusive; it verifies nothing. Above it lie the pull client
(`pipeline.registry.client`), which trusts digests and signatures only, and the life cycle
(`pipeline.registry.lifecycle`), which decides what may move where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from pipeline.core.values import FileDigest, Package, Reference


@dataclass(frozen=True, kw_only=True, order=True)
class Place:
    """One published version.

    Attributes:
        name: Recipe.
        variant: Format, precision, shape and SM or card.
        version: Immutable version.
    """

    name: str
    variant: str
    version: str

    @classmethod
    def of(cls, reference: Reference) -> Place:
        """Where a package with this reference lies."""
        return cls(name=reference.name, variant=reference.variant, version=reference.version)

    def __str__(self) -> str:
        return f"{self.name}/{self.variant}:{self.version}"


@dataclass(frozen=True, kw_only=True)
class StoredStatement:
    """A statement beside a version, unread.

    Attributes:
        name: Its folder's name.
        made_s: When it was written, Unix time, by the store's clock.
        sizes: File name -> bytes.
    """

    name: str
    made_s: float
    sizes: Mapping[str, int] = field(default_factory=dict)


@runtime_checkable
class Store(Protocol):
    """Reads. Every method may raise AccessError (refused) and TransientError (try again)."""

    @property
    def url(self) -> str:
        """Names it in messages; no secrets."""
        ...

    @property
    def public(self) -> bool:
        """Whether everybody can read what is published here."""
        ...

    @property
    def local(self) -> bool:
        """Whether it is a folder of this machine: only there a local key counts."""
        ...

    def names(self) -> list[str]:
        """All recipes, sorted."""
        ...

    def variants(self, name: str) -> list[str]:
        """All variants of a recipe, sorted; empty if there is none."""
        ...

    def versions(self, name: str, variant: str) -> list[str]:
        """All complete versions, sorted; one that is being published is not among them."""
        ...

    def read_manifest(self, place: Place) -> bytes:
        """The bytes of `manifest.json`, as they were published.

        Raises:
            NotFoundError: No such version.
            CorruptError: Longer than a manifest may be.
        """
        ...

    def open_file(
        self, place: Place, file: FileDigest, offset: int = 0, end: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """The bytes of one file of a package from `offset` on, in chunks of the store's choice.

        Nothing is promised of them: there may be too few, too many or wrong ones.

        Args:
            place: The version.
            file: Which, as its manifest lists it.
            offset: First byte.
            end: First byte that the caller will not read, so that nothing is sent in vain; None
                for all that there is, be it more than the manifest says.

        Raises:
            NotFoundError: No such file.
            TransientError: The connection broke; also while iterating.
        """
        ...

    def statements(self, place: Place) -> list[StoredStatement]:
        """What was said about a version, newest first."""
        ...

    def read_statement(self, place: Place, name: str) -> dict[str, bytes]:
        """All files of one statement.

        Raises:
            NotFoundError: No such statement.
            CorruptError: Larger than a statement may be.
        """
        ...

    def channels(self, name: str, variant: str) -> dict[str, bytes]:
        """File name (`<channel>.<card>.json`) -> content of all channel pointers of a variant."""
        ...

    def moves(self, name: str, variant: str) -> dict[str, bytes]:
        """File name (`<channel>.<card>.<seq>.dsse.json`) -> content of the log of channel moves."""
        ...


@runtime_checkable
class WritableStore(Store, Protocol):
    """Writes, too."""

    def check_writable(self) -> None:
        """Find out, before any work, whether packages can be published here; leaves no trace.

        Raises:
            AccessError: They cannot; says what to change.
        """
        ...

    def put_package(
        self,
        package: Package,
        statements: Mapping[str, Mapping[str, bytes]],
        on_bytes: Callable[[int], None],
    ) -> bool:
        """Make a sealed package visible, whole and for ever; its statements before itself.

        Bytes are hashed as they go out. A statement whose name is taken stays as it is: whoever
        publishes verifies afterwards what lies there. After an interruption the same call
        completes what was begun.

        Args:
            package: Its manifest says where it goes.
            statements: Such as the signatures: nobody may see the package without them.
            on_bytes: Called with the number of bytes sent, for progress.

        Returns:
            Whether it is new; False if the same digest was there.

        Raises:
            ConflictError: The version holds, or someone publishes, other bytes; not overwritten.
            CorruptError: A file is not what the manifest says.
            TransientError: No space, or the connection broke.
        """
        ...

    def put_statement(self, place: Place, name: str, files: Mapping[str, bytes]) -> bool:
        """Add a statement; whole or not at all to its readers. False if the same bytes were there.

        Raises:
            ConflictError: Other bytes are there under this name.
            NotFoundError: No such version.
        """
        ...

    def put_move(self, name: str, variant: str, file: str, data: bytes) -> None:
        """Append one move to the log of channels, exclusively.

        Raises:
            ConflictError: A move of this name is there.
        """
        ...

    def put_channel(self, name: str, variant: str, file: str, data: bytes) -> None:
        """Write a channel pointer, in place of what was there: the log decides, this shows."""
        ...

    def delete_version(self, place: Place) -> int:
        """Remove a version with its statements; invisible at once. Returns the bytes freed."""
        ...

    def now_s(self) -> float:
        """Unix time by the clock that dates `statements` here, so that ages are right everywhere.

        It is the server's or the file system's; this machine's where statements carry their
        writers' own dates.
        """
        ...

    def leftovers(self, min_age_s: float, *, delete: bool) -> list[str]:
        """What interrupted runs left behind and no reader sees, at least so old; in words.

        Args:
            min_age_s: Younger ones may be of a run that goes on.
            delete: Remove them.
        """
        ...
