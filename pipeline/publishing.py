"""The end of the line: find what is published, publish a package, add a signed test result."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from pipeline.core.errors import CorruptError, NotFoundError, UntrustedError
from pipeline.core.ownership import CACHE, make_own
from pipeline.core.progress import BYTES, progress
from pipeline.core.published import PASSING, Package, VerdictName
from pipeline.core.settings import cache_root
from pipeline.core.values import Verdict
from pipeline.core.workfolder import work_folder
from pipeline.registry.client.deliver import (
    cache_entry,
    locked_cache,
    move_into_place,
    settle_read_only,
)
from pipeline.registry.client.verify import fetch
from pipeline.registry.disk import disk_errors
from pipeline.registry.package import is_throwaway, require_manifest_publishable
from pipeline.registry.promotion import Releaser
from pipeline.registry.reference import reference_of
from pipeline.registry.resolve import examine
from pipeline.registry.store import Place
from pipeline.registry.stores.folder_writing import STAGING
from pipeline.registry.stores.publication import WritableStore
from pipeline.registry.trust.signing import Signatory, actor_of, now_text, sign_test
from pipeline.registry.trust.statements import whole_statements
from pipeline.registry.trust.verification import Resolved, Terms, read_channels

log = logging.getLogger(__name__)

CHANNEL = "candidate"
"""Where a build ends; `stable` needs a package that was accepted on the card."""


@dataclass(frozen=True, kw_only=True)
class Publisher:
    """Publishes the packages and test results of one run, which are for one card."""

    store: WritableStore
    signatory: Signatory
    card: str

    @property
    def signed_by(self) -> str:
        """Who signs a report that is written now, and when, for its page."""
        key = self.signatory.key.public
        names = [str(one) for one in self.signatory.trust.keys if one.key.keyid == key.keyid]
        return f"{(names or [key.keyid[:12]])[0]}, {now_text()[:19]}Z"

    @property
    def terms(self) -> Terms:
        """What this run trusts."""
        return Terms(policy=self.signatory.trust)

    def find(self, name: str, variant: str, build_key: str) -> Resolved | None:
        """The published package that stands for all of a build key; None if there is none.

        Of those that are verified and not yanked, the one that this card's `candidate` points to,
        else the latest by trusted provenance. UntrustedError if all that there are were yanked.
        """
        usable: list[Resolved] = []
        yanked: UntrustedError | None = None
        for place in self.store.places(name, variant):
            if f"-{build_key[:8]}-" not in place.version:
                continue
            try:
                one = examine(self.store, place, replace(self.terms, allow_yanked=True))
            except (CorruptError, UntrustedError, NotFoundError) as error:
                log.warning("%s does not stand for this build: %s", place, error)
                continue
            if one.package.manifest["build_key"] != build_key:
                continue
            if one.yank is None:
                usable.append(one)
            else:
                yanked = UntrustedError(
                    f"{place} was yanked {one.yank}; this recipe would build the same again, so "
                    "nothing is built. Change the recipe, take the yank back with enginesmith yank "
                    f"{place} --undo --registry {self.store.url}, or build once more with --rebuild"
                )
        if yanked is not None and not usable:
            raise yanked
        channels = read_channels(self.store, self.terms.policy, name, variant, CHANNEL)
        pointed = {one.newest.reference.digest for one in channels if one.card == self.card}
        usable.sort(key=lambda one: (one.package.digest in pointed, one.built_at), reverse=True)
        if not usable:
            return None
        log.info("%s was built before from the same inputs", usable[0].place)
        return usable[0]

    def known_result(
        self, found: Resolved, question: str, folder: Path
    ) -> tuple[VerdictName, Mapping[str, Path]] | None:
        """An earlier passing answer to the key of an acceptance; `folder` gets its report."""
        passing = {
            verdict.statement: verdict.verdict
            for verdict in found.verdicts
            if verdict.question == question and verdict.verdict in PASSING
        }
        asked = [one for one in found.statements if one.name in passing]
        for one, files in whole_statements(asked, self.store, found.place):
            for name, data in files.items():
                (folder / name).write_bytes(data)
            return passing[one.name], {name: folder / name for name in files}
        return None

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder to seal a package in, gone after the block."""
        team = self.store.local
        # On the file system of the registry if that is a folder, so that files are moved there.
        area = Path(self.store.url) / STAGING if team else cache_root() / "staging"
        with contextlib.ExitStack() as stack:
            with disk_errors(f"prepare a package in {area}", CACHE):
                make_own(area, CACHE, 0o775 if team else 0o700, team=team)
                work = stack.enter_context(work_folder(area, "seal-", shared=team))
            yield work.dir

    def publish(self, package: Package, begun: datetime) -> tuple[Resolved, bool]:
        """Sign a sealed package, whose build began at `begun`, and publish it.

        Gives the package as it is published, and whether it is new. RecipeError if its licence
        forbids it, or it is a rehearsal; UntrustedError if these very bytes were published before,
        and yanked.
        """
        throwaway = self.store.local and is_throwaway(Path(self.store.url))
        require_manifest_publishable(
            package.manifest, public=self.store.public, throwaway=throwaway
        )
        place = Place.of(reference_of(package))
        signed = self.signatory.sign_build(package, begun)
        doing = f"{'Trying to publish' if throwaway else 'Publishing'} {place}"
        with progress(doing, package.size_bytes, BYTES) as on_bytes:
            new = self.store.put_package(package, signed, on_bytes)
        if not throwaway:
            log.info("%s %s", "Published" if new else "Already published:", place)
        if not self.store.local:  # need not be fetched again to be used here
            with disk_errors(f"keep {place} in the cache", CACHE):
                settle_read_only(package.dir)
                with locked_cache(place):
                    move_into_place(package.dir, cache_entry(place))
        unsigned = replace(self.terms, allow_unsigned=True, allow_yanked=True)
        if not new and examine(self.store, place, unsigned).signer is None:
            # The same bytes lie there, with no signature that is trusted.
            for raw in signed:
                self.store.put_statement(place, raw)
        return examine(self.store, place, self.terms, package.digest), new

    def add_result(
        self, found: Resolved, verdict: Verdict, files: Mapping[str, Path], question: str
    ) -> Resolved:
        """Sign a verdict, with its report's files by name, and add it to a package.

        Gives the package with all that is stated about it; untrusted if it was yanked meanwhile.
        """
        runtime = found.package.manifest["match"]["runtime"]
        raw = sign_test(
            found.package.digest,
            self.signatory.key,
            card=self.card,
            runtime=(runtime["name"], runtime["version"]),
            verdict=verdict.name,
            files={name: path.read_bytes() for name, path in files.items()},
            question=question,
        )
        self.store.put_statement(found.place, raw)
        return examine(self.store, found.place, self.terms, found.package.digest)

    def enter_candidate(
        self, found: Resolved, environ: Mapping[str, str], *, before: Resolved | None = None
    ) -> None:
        """Let `candidate` of the card point to a package; `environ` names who acts.

        Not if it points to another one of the same build, `before`, with the same verdict.

        Raises like `Releaser.enter`.
        """
        if before is not None and before.package.digest != found.package.digest:
            old, new = (one.standing(self.card) for one in (before, found))
            if old is not None and new is not None and old.verdict == new.verdict:
                kept = (CHANNEL, before.place, old.verdict)
                log.info("%s stays: %s is of the same build and %s", *kept)
                return
        signs, actor = self.signatory, actor_of(environ)
        releaser = Releaser(store=self.store, policy=signs.trust, key=signs.key, actor=actor)
        releaser.enter(found, CHANNEL, self.card)

    def local_copy(self, found: Resolved) -> Package:
        """A package in a folder of this machine, every byte verified."""
        return fetch(self.store, found)
