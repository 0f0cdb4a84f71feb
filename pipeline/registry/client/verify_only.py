"""Verify a folder that somebody else filled: a volume, a mounted image, an earlier pull."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path

from pipeline.registry.client.examine import fetch_statements
from pipeline.registry.client.layout import STATEMENTS, check_model_signature, verify_layout
from pipeline.registry.client.machine import facts_of
from pipeline.registry.client.pull import PullRequest, rules_of, scratch_folder
from pipeline.registry.client.receipt import Pulled, pulled
from pipeline.registry.client.resolve import Offer
from pipeline.registry.client.select import Candidate, best, judge
from pipeline.registry.lifecycle.yank import read_yank_in, require_not_yanked
from pipeline.registry.manifest import manifest_bytes
from pipeline.registry.reference import STATEMENTS_SUFFIX, ParsedReference, reference_of
from pipeline.registry.signing.machine import machine_trust
from pipeline.registry.signing.verification import verify_signatures
from pipeline.registry.stores.store import Place


def verify_only(folder: Path, request: PullRequest) -> Pulled:
    """Verify bytes, signatures, policy and fit of a folder; writes nothing there.

    Signatures are taken from `statements/` in the folder, else from `<folder>.statements` beside
    it, else from the registry if one was given.

    Args:
        folder: With `manifest.json` and `engine/`.
        request: `reference` and `to` do not count; `registry` counts if it is not empty.

    Raises:
        PipelineError: As in `run`.
    """
    started_s = time.monotonic()
    facts = facts_of(request.flags, request.environ)
    policy = machine_trust(request.environ, own_folder=True, policy=request.policy)
    package = verify_layout(folder)
    reference = reference_of(package)
    offer = Offer(place=Place.of(reference), digest=package.digest)
    with contextlib.ExitStack() as stack:
        statements, where = _statements_of(folder, offer, request, stack)
        verification = verify_signatures(
            package, statements, policy, allow_unsigned=request.allow_unsigned
        )
        if check_model_signature(folder, package, policy):
            verification = replace(verification, model_signature="verified")
        there = statements.iterdir() if statements.is_dir() else ()
        yank = read_yank_in(there, package.digest, policy)
        require_not_yanked(yank, allowed=request.allow_yanked)
        candidate = Candidate(
            offer=offer,
            package=package,
            data=manifest_bytes(package.manifest),
            verification=verification,
            statements_dir=statements,
            yank=yank,
        )
    judged = judge(candidate, facts, rules_of(request))
    wanted = ParsedReference(
        name=reference.name, variant=reference.variant, digest=reference.digest
    )
    return pulled(
        best([judged], [], wanted, facts),
        dir=folder,
        registry=where,
        came="verified",
        facts=facts,
        seconds=time.monotonic() - started_s,
    )


def _statements_of(
    folder: Path, offer: Offer, request: PullRequest, stack: contextlib.ExitStack
) -> tuple[Path, str]:
    """Where the statements about a folder are, and whence they came."""
    absolute = folder.absolute()
    for near in (
        absolute / STATEMENTS,
        absolute.with_name(f"{absolute.name}{STATEMENTS_SUFFIX}"),
    ):
        if near.is_dir() and any(near.iterdir()):
            return near, str(folder)
    if not request.registry or request.offline:
        return absolute / STATEMENTS, str(folder)
    from pipeline.registry.stores.opening import open_store

    store = open_store(request.registry)
    scratch = stack.enter_context(scratch_folder(None)) / STATEMENTS
    fetch_statements(store, offer.place, scratch, request.transfer.retry)
    return scratch, store.url
