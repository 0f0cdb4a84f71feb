"""Verify a package where it is: in a registry, or in a folder that another process filled.

    verified = verify(PullRequest(reference="/models/phi3", flags=Flags(gpu="auto")))

Every byte, its signatures, its yanks and, for a card, its proof. Writes nothing into the folder.
"""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.core.errors import NotFoundError
from pipeline.core.values import Package
from pipeline.registry.client.layout import (
    STATEMENTS,
    STATEMENTS_SUFFIX,
    check_model_signature,
    read_statements,
    verify_layout,
)
from pipeline.registry.client.machine import facts_of
from pipeline.registry.client.pull import ARTIFACTS, PullRequest, fetch
from pipeline.registry.client.receipt import Pulled
from pipeline.registry.manifest import MANIFEST
from pipeline.registry.package import verify as verify_package
from pipeline.registry.reference import ParsedReference, reference_of
from pipeline.registry.resolve import Resolved, Terms, examine_package, resolve
from pipeline.registry.select import best
from pipeline.registry.store import Place, RawStatement, Store
from pipeline.registry.stores.opening import open_store


def verify(request: PullRequest) -> Pulled:
    """Verify bytes, signatures, yanks and fit of one package.

    Raises:
        CorruptError: Bytes changed.
        UntrustedError: A signature is missing or not by a trusted key, or it was yanked.
        IncompatibleError: It does not fit the machine, or is not proven on it.
        NotFoundError: No such package.
        RecipeError: Not a reference, or a flag or the policy cannot be read.
    """
    started_s = time.monotonic()
    facts = facts_of(request.flags, request.environ)
    resolved, package, where = open_target(request)
    wanted = ParsedReference(
        name=resolved.place.name, variant=resolved.place.variant, digest=package.digest
    )
    # Without a card there is none that it could be unproven on: what it is proven on is told.
    accept = request.accept_unproven or request.flags.gpu == "none"
    return Pulled(
        chosen=best([resolved], [], wanted, facts, accept_unproven=accept),
        dir=package.dir,
        registry=where,
        origin="verified",
        facts=facts,
        seconds=time.monotonic() - started_s,
    )


def open_target(request: PullRequest) -> tuple[Resolved, Package, str]:
    """A package in a folder of this machine, fit to be loaded: all verified but its fit.

    Returns:
        What was verified about it, the package in its folder, and where it was looked up.

    Raises:
        PipelineError: As in `verify`.
    """
    if folder := named_folder(request.reference):
        store = open_store(request.registry) if request.registry else None
        resolved = open_folder(folder, request.terms(local=True), store)
        return resolved, resolved.package, store.url if store else str(folder)
    store = open_store(request.registry or ARTIFACTS)
    resolved = resolve(store, request.reference, request.terms(local=store.local))
    return resolved, fetch(store, resolved), store.url


def open_folder(folder: Path, terms: Terms, store: Store | None) -> Resolved:
    """A package in a folder, every byte verified.

    The folder is that of a folder registry, with `<folder>.statements` beside it, or what a pull
    left, with `statements/`, `engine/model.sig` and `pull.json` in it.

    A store is asked for newer statements about it; None to ask nowhere.

    Raises:
        CorruptError: It is damaged, or holds something else.
        UntrustedError: As in `resolve`, or `engine/model.sig` is not the one that was signed.
    """
    beside = folder.with_name(f"{folder.name}{STATEMENTS_SUFFIX}")
    published = beside.is_dir()
    package = verify_package(folder) if published else verify_layout(folder)
    statements = {
        one.name: one for one in read_statements(beside if published else folder / STATEMENTS)
    }
    if store is not None:
        statements = {one.name: one for one in _stored(store, package)} | statements
    resolved = examine_package(package, list(statements.values()), terms, str(folder))
    check_model_signature(folder, resolved)
    return resolved


def _stored(store: Store, package: Package) -> list[RawStatement]:
    """What a registry has about a package; nothing where it does not have the package."""
    try:
        return store.read_statements(Place.of(reference_of(package)))
    except NotFoundError:
        return []


def named_folder(target: str) -> Path | None:
    """The folder that was named; None for a reference.

    A reference has no leading dot or slash, and never names a folder with a manifest by accident.
    """
    path = Path(target).expanduser()
    if target.startswith((".", "/", "~")) or (path / MANIFEST).exists():
        return path.resolve()
    return None
