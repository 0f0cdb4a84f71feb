"""Verify a package where it is: in a folder of this machine, or in a registry.

    verified = verify(PullRequest(reference="/models/phi3", flags=Flags(gpu="auto")))

Nothing is written into the package's folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

from pipeline.core.errors import AccessError, CorruptError, NotFoundError, UntrustedError
from pipeline.core.ownership import open_to_others
from pipeline.core.published import Package
from pipeline.registry.client.deliver import (
    SIGNATURE,
    STATEMENTS,
    STATEMENTS_SUFFIX,
    Delivery,
    verify_layout,
)
from pipeline.registry.client.machine import facts_of
from pipeline.registry.client.pull import ARTIFACTS, Pulled, PullRequest
from pipeline.registry.disk import read_bounded
from pipeline.registry.manifest import MANIFEST
from pipeline.registry.manifest import verify as verify_package
from pipeline.registry.reference import reference_of
from pipeline.registry.resolve import resolve
from pipeline.registry.select import best
from pipeline.registry.store import (
    MAX_ATTACHMENT_BYTES,
    Place,
    RawStatement,
    Store,
    is_statement_name,
)
from pipeline.registry.stores import open_reader, package_dir
from pipeline.registry.trust.statements import MODEL_SIGNATURE, verified_files
from pipeline.registry.trust.verification import Resolved, Terms, require_usable, verify_statements

log = logging.getLogger(__name__)

_MAX_STATEMENTS = 4000
"""As many as a store's bound lets through (`pipeline.registry.store`)."""


def verify(request: PullRequest) -> Pulled:
    """Verify bytes, signatures, yanks and fit of one package; raises like `run`."""
    started_s = time.monotonic()
    facts = facts_of(request.flags, request.environ)
    resolved, package, where = open_target(request)
    # Without a card there is none that it could be unproven on: what it is proven on is told.
    accept = request.accept_unproven or request.flags.gpu == "none"
    return Pulled(
        chosen=best([resolved], [], resolved.place, facts, accept_unproven=accept),
        dir=package.dir,
        registry=where,
        origin="verified",
        facts=facts,
        seconds=time.monotonic() - started_s,
    )


def open_target(request: PullRequest, *, to_load: bool = False) -> tuple[Resolved, Package, str]:
    """What was verified of a package, all but its fit; where it lies, and where it was looked up.

    Raises like `run`.
    """
    if folder := named_folder(request.reference):
        if not folder.is_dir():
            raise NotFoundError(f"{folder} is not a folder; name one that enginesmith pull made")
        if to_load and (reason := open_to_others(folder)):
            raise AccessError(f"{reason}; pull the package to a folder that only you can change")
        store = open_reader(request.registry) if request.registry else None
        resolved = _open_folder(folder, request.terms(local=True), store)
        return resolved, resolved.package, store.url if store else str(folder)
    store = open_reader(request.registry or ARTIFACTS)
    resolved = resolve(store, request.reference, request.terms(local=store.local))
    if not to_load:
        _check_reports(store, resolved)
    return resolved, fetch(store, resolved, to_load=to_load), store.url


def fetch(store: Store, resolved: Resolved, *, to_load: bool = False) -> Package:
    """A resolved package in a folder of this machine, every byte verified.

    In its registry, if that is a folder where it lies alone, and, if it is `to_load`, where no
    other user can change it any more; else in the cache.
    """
    folder = package_dir(store, resolved.place)
    if folder and not (to_load and open_to_others(folder)):
        try:
            return verify_package(folder)
        except CorruptError as error:  # a file too many, perhaps, which does not travel
            log.info("%s; the files that its manifest lists are used", error)
    done = Delivery(store=store, resolved=resolved).to_cache()
    return replace(resolved.package, dir=done.dir)


def _open_folder(folder: Path, terms: Terms, store: Store | None) -> Resolved:
    """A package in a folder, every byte verified.

    The folder is that of a folder registry, with `<folder>.statements` beside it, or what a pull
    left, with `statements/`, `engine/model.sig` and `pull.json` in it. A store is asked for newer
    statements about it.
    """
    beside = folder.with_name(f"{folder.name}{STATEMENTS_SUFFIX}")
    published = beside.is_dir()
    package = verify_package(folder) if published else verify_layout(folder)
    if published and store is None:
        store = open_reader(str(folder.parent.parent.parent))  # the registry that it lies in
    found, registry, origin = _read_statements(folder / STATEMENTS), None, str(folder)
    if store is not None:
        registry = store.identity()  # another one's yanks, and what undid them, do not count
        found = [*store.read_statements(Place.of(reference_of(package))), *found]
    raws = list({one.name: one for one in found}.values())
    resolved = verify_statements(package, raws, terms.policy, registry=registry, origin=origin)
    require_usable(resolved, terms, origin)
    _check_model_signature(folder, resolved)
    if published and store is not None:
        _check_reports(store, resolved)
    return resolved


def named_folder(target: str) -> Path | None:
    """The folder that was named; None for a reference.

    A reference has no leading dot or slash, and never names a folder with a manifest by accident.
    """
    path = Path(target).expanduser()
    if target.startswith((".", "/", "~")) or (path / MANIFEST).exists():
        return Path(os.path.realpath(path))
    return None


def _read_statements(folder: Path) -> list[RawStatement]:
    """The statements in a folder, unverified; what has no statement's name or form is left out."""
    found: list[RawStatement] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if len(found) == _MAX_STATEMENTS:
            break
        with contextlib.suppress(CorruptError, OSError):
            if is_statement_name(path.name) and path.is_dir() and not path.is_symlink():
                files = {
                    one.name: read_bounded(one, MAX_ATTACHMENT_BYTES) for one in path.iterdir()
                }
                found.append(RawStatement(name=path.name, files=files))
    return found


def _check_reports(store: Store, resolved: Resolved) -> None:
    """Compare what lies beside statements, which people read."""
    for one in resolved.statements:
        verified_files(one, store, resolved.place, some=True)


def _check_model_signature(folder: Path, resolved: Resolved) -> None:
    path, signed = folder / SIGNATURE, resolved.model_signature
    if not path.exists() or signed is None:
        return
    found = hashlib.sha256(read_bounded(path, MAX_ATTACHMENT_BYTES)).hexdigest()
    if found != signed.files[MODEL_SIGNATURE]:
        raise UntrustedError(
            f"{path} has SHA-256 {found[:12]}, the trusted signature names "
            f"{signed.files[MODEL_SIGNATURE][:12]}; pull the package again"
        )
