"""A registry in a folder: the published tree that any web server or `ls` can read.

    <root>/<name>/<variant>/<version>/manifest.json, engine/    one package, never changed
    <root>/<name>/<variant>/<version>.statements/<statement>/   append-only
    <root>/<name>/<variant>/channels/<channel>.<card>.json      pointers that move
    <root>/.staging/                                            ours, empty between runs
    <root>/.locks/                                              ours, empty files

A package becomes visible by one rename that cannot overwrite (see `disk`). Only channels take a
lock, since only they move.

**Damage.** A published package that no longer verifies keeps its version: other people may hold the
good bytes under that name, and a rebuild would not have the same ones. So `find` warns and does not
take it, `next_version` gives the build the next free `.rN`, and nothing here deletes or moves it.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from pydantic.dataclasses import dataclass

from pipeline.cache import locked
from pipeline.errors import (
    AccessError,
    ConflictError,
    CorruptError,
    NotFoundError,
    PipelineError,
    RecipeError,
    UntrustedError,
)
from pipeline.registry.backend import Entry
from pipeline.registry.disk import (
    disk_errors,
    move_into_place,
    read_bounded,
    replace_file,
    settle,
    write_new,
)
from pipeline.registry.lookup import Choice, Shelf, choose, no_such_name
from pipeline.registry.manifest import MANIFEST, read_manifest
from pipeline.registry.package import verify
from pipeline.registry.policy import require_no_rehearsal
from pipeline.registry.reference import (
    STATEMENTS_SUFFIX,
    ParsedReference,
    Part,
    check_part,
    numbered,
    parse_reference,
    rebuild_of,
    reference_of,
)
from pipeline.registry.staging import private_folder
from pipeline.registry.statements import (
    REPORT,
    Pointer,
    read_pointer,
    read_pointers,
    read_statements,
    report_digest,
)
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

    path: PathField

    def check_writable(self) -> None:
        with disk_errors(f"publish to {self.path}"):
            existing = self.path
            while not existing.exists() and existing != existing.parent:
                existing = existing.parent
            if not existing.is_dir():
                raise AccessError(
                    f"cannot publish to {self.path}: {existing} is not a folder; "
                    "choose another with registry.path="
                )
            with tempfile.NamedTemporaryFile(prefix=".writable-", dir=existing) as stream:
                stream.write(b"\0")  # a full disk still makes empty files
                stream.flush()

    def location(self, reference: Reference) -> Path:
        """The folder of a published package."""
        return self._dir(reference.name, reference.variant, reference.version)

    def find(self, name: str, variant: str, build_key: str) -> Package | None:
        with disk_errors(f"look for a finished build in {self.path}"):
            for version in sorted(self._versions(name, variant), key=rebuild_of, reverse=True):
                folder = self._dir(name, variant, version)
                # Versions carry the start of their build key: it still tells whose they are when
                # the manifest cannot be read.
                ours = build_key[:12] in version
                try:
                    ours = read_manifest(folder / MANIFEST)[0]["build_key"] == build_key
                    if ours:
                        return self._open(name, variant, version)
                except CorruptError as error:
                    if ours:
                        log.warning("%s; it is not taken. %s", error, self._quarantine(folder))
        return None

    def next_version(self, name: str, variant: str, version: str) -> str:
        base = check_part("version", rebuild_of(version)[1])
        number = 1
        while self._dir(name, variant, version := numbered(base, number)).exists():
            number += 1
        return version

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        with contextlib.ExitStack() as stack:
            with disk_errors(f"prepare a package in {self.path}"):
                folder = stack.enter_context(private_folder(self.path / ".staging"))
            yield folder

    def publish(self, package: Package) -> Reference:
        sealed = verify(package.dir)
        if sealed.digest != package.digest:
            raise CorruptError(f"{package.dir} changed since it was sealed; build it again")
        require_no_rehearsal(sealed.manifest, self.path)
        reference = reference_of(sealed)
        target = self.location(reference)
        with disk_errors(f"publish {reference} to {self.path}"):
            settle(package.dir)
            moved = move_into_place(package.dir, target)
        if moved:
            log.info("Published %s", target)
        else:
            self._check_same(reference)
            log.info("%s is already published with these bytes", target)
        return reference

    def add_statement(
        self, reference: Reference, name: str, files: Mapping[str, bytes | Path]
    ) -> Path:
        check_part("statement", name)
        self._check_published(reference)
        target = self._statements_dir(reference) / name
        with (
            disk_errors(f"write {target}"),
            private_folder(self.path / ".staging") as private,
        ):
            contents = {
                check_part("statement", file): data
                if isinstance(data, bytes)
                else data.read_bytes()
                for file, data in files.items()
            }
            if not contents:
                raise ValueError(f"statement {name} has no files")
            if REPORT in contents and report_digest(contents[REPORT]) != reference.digest:
                raise CorruptError(f"{REPORT} of {name} speaks of another package than {reference}")
            for file, data in contents.items():
                write_new(private / file, data)
            settle(private)
            if not move_into_place(private, target) and _folder_bytes(target) != contents:
                raise ConflictError(
                    f"{target} holds other bytes; statements are only ever added, "
                    "so give this one another name"
                )
        return target

    def set_channel(self, reference: Reference, channel: str, card: str) -> Path:
        check_part("channel", channel)
        check_part("card", card)
        if channel == "stable":
            raise UntrustedError(
                "stable takes only packages with a signed test result, and this version cannot "
                "sign yet; use candidate"
            )
        self._check_published(reference)
        self._check_passed(reference, card)
        lock = self.path / ".locks" / f"{reference.name}--{reference.variant}.lock"
        with disk_errors(f"set {channel} of {reference}"), locked(lock):
            pointer = Pointer(channel=channel, card=card, reference=reference, seq=1)
            path = pointer.path(self.path)
            if path.exists():
                current = read_pointer(path)
                if current.reference == reference:
                    return path
                pointer = Pointer(
                    channel=channel, card=card, reference=reference, seq=current.seq + 1
                )
            with private_folder(self.path / ".staging") as private:
                write_new(private / path.name, pointer.to_bytes())
                replace_file(private / path.name, path)
        log.info("%s of %s is now %s", channel, card, reference)
        return path

    def resolve(self, text: str, card: str | None = None) -> Package:
        with disk_errors(f"read {self.path}"):
            wanted = parse_reference(text)
            choice = self._choose(wanted, card)
            package = self._open(wanted.name, choice.variant, choice.version)
        if choice.digest not in {None, package.digest}:
            raise CorruptError(
                f"{text} must have digest {choice.digest}, {package.dir} has {package.digest}; "
                "publish it again"
            )
        return package

    def entry(self, text: str, card: str | None = None) -> Entry:
        with disk_errors(f"read {self.path}"):
            wanted = parse_reference(text)
            choice = self._choose(wanted, card)
            pointers = read_pointers(self.path / wanted.name / choice.variant)
            return self._entry(wanted.name, choice.variant, choice.version, pointers, deep=True)

    def entries(self) -> list[Entry]:
        found = []
        with disk_errors(f"read {self.path}"):
            for name in _subfolders(self.path, "name"):
                for variant in _subfolders(self.path / name, "variant"):
                    pointers = read_pointers(self.path / name / variant)
                    found += sorted(
                        (
                            self._entry(name, variant, version, pointers, deep=False)
                            for version in self._versions(name, variant)
                        ),
                        key=lambda entry: (-entry.made_s, entry.version),
                    )
        return found

    def _choose(self, wanted: ParsedReference, card: str | None) -> Choice:
        """The published version that a reference means."""
        versions = {
            variant: held
            for variant in _subfolders(self.path / wanted.name, "variant")
            if (held := self._versions(wanted.name, variant))
        }
        if not versions:
            names = _subfolders(self.path, "name")
            raise no_such_name(wanted.name, names, str(self.path))
        if wanted.digest is not None:
            return self._with_digest(wanted, versions)
        pointers = [
            pointer
            for variant in versions
            for pointer in read_pointers(self.path / wanted.name / variant)
        ]
        shelf = Shelf(name=wanted.name, versions=versions, pointers=pointers)
        choice = choose(wanted, shelf, card)
        if choice.version not in versions[choice.variant]:
            raise NotFoundError(
                f"{wanted} points to {wanted.name}/{choice.variant}:{choice.version}, "
                "which is gone; publish it again or name another version"
            )
        return choice

    def _with_digest(self, wanted: ParsedReference, versions: Mapping[str, list[str]]) -> Choice:
        for variant, held in versions.items():
            for version in held if wanted.variant in {None, variant} else ():
                folder = self._dir(wanted.name, variant, version)
                with contextlib.suppress(CorruptError):
                    if read_manifest(folder / MANIFEST)[1] == wanted.digest:
                        return Choice(variant=variant, version=version, digest=wanted.digest)
        raise NotFoundError(
            f"{self.path} has no package {wanted}; `enginesmith list` shows what there is"
        )

    def _entry(
        self, name: str, variant: str, version: str, pointers: list[Pointer], *, deep: bool
    ) -> Entry:
        folder = self._dir(name, variant, version)
        package, fault = None, ""
        try:
            package = self._open(name, variant, version, deep=deep)
        except CorruptError as error:
            fault = str(error)
        digest = package.digest if package else None
        statements = read_statements(folder.with_name(f"{version}{STATEMENTS_SUFFIX}"))
        return Entry(
            name=name,
            variant=variant,
            version=version,
            made_s=folder.stat().st_mtime,
            package=package,
            fault=fault,
            statements=tuple(found for found in statements if found.digest in {"", digest}),
            channels=tuple(found for found in pointers if found.reference.version == version),
        )

    def _open(self, name: str, variant: str, version: str, *, deep: bool = True) -> Package:
        """A verified package that says of itself what its path says."""
        folder = self._dir(name, variant, version)
        package = verify(folder, deep=deep)
        reference = reference_of(package)
        if (reference.name, reference.variant, reference.version) != (name, variant, version):
            raise CorruptError(f"{folder} holds {reference}, not what its path says; move it back")
        return package

    def _check_same(self, reference: Reference) -> None:
        """Raise unless what is published under this version has the same digest and is whole."""
        folder = self.location(reference)
        advice = "nothing was overwritten; run the same command with --rebuild to publish beside it"
        try:
            published = verify(folder)
        except CorruptError as error:
            raise ConflictError(
                f"{reference} is taken by a damaged package ({error}); {advice}. "
                f"{self._quarantine(folder)}"
            ) from error
        if published.digest != reference.digest:
            raise ConflictError(
                f"{reference} is already published with other bytes (digest "
                f"{published.digest[:12]}, these have {reference.digest[:12]}); {advice}"
            )

    def _check_published(self, reference: Reference) -> None:
        folder = self.location(reference)
        if not folder.is_dir():
            raise NotFoundError(f"{folder} does not exist; publish {reference} first")
        with disk_errors(f"read {folder}"):
            digest = read_manifest(folder / MANIFEST)[1]
        if digest != reference.digest:
            raise ConflictError(f"{folder} has digest {digest}, not {reference.digest}")

    def _check_passed(self, reference: Reference, card: str) -> None:
        """Raise unless the newest statement about this package on this card passed."""
        said = [
            found
            for found in read_statements(self._statements_dir(reference))
            if found.digest == reference.digest and found.card == card and found.verdict
        ]
        if not said or not said[0].passed:
            verdict = f"its newest verdict is {said[0].verdict}" if said else "it has no statement"
            raise PipelineError(
                f"{reference} may not enter a channel of {card}: {verdict}; "
                "it needs accepted, checked or compiled"
            )

    def _quarantine(self, folder: Path) -> str:
        aside = self.path / f".damaged-{folder.parent.parent.name}-{folder.name}"
        return f"To put the damaged one aside: mv {folder} {aside}"

    def _dir(self, name: str, variant: str, version: str) -> Path:
        return (
            self.path
            / check_part("name", name)
            / check_part("variant", variant)
            / check_part("version", version)
        )

    def _statements_dir(self, reference: Reference) -> Path:
        return self.location(reference).with_name(f"{reference.version}{STATEMENTS_SUFFIX}")

    def _versions(self, name: str, variant: str) -> list[str]:
        return _subfolders(self.path / name / variant, "version")


def _subfolders(folder: Path, part: Part) -> list[str]:
    """Sorted names of the subfolders that are a valid `part`; what else lies there is not ours."""
    names = []
    if folder.is_dir():
        for path in folder.iterdir():
            with contextlib.suppress(RecipeError):
                if path.is_dir() and not path.is_symlink():
                    names.append(check_part(part, path.name))
    return sorted(names)


def _folder_bytes(folder: Path) -> dict[str, bytes] | None:
    """Content of every file of a statement; None if it is no such folder."""
    try:
        return {
            path.name: read_bounded(path, path.lstat().st_size) for path in sorted(folder.iterdir())
        }
    except (CorruptError, NotADirectoryError):
        return None
