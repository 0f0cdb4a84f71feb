"""Pull a package; the Python API. Its neighbour `verify` verifies one where it is.

    pulled = run(PullRequest(reference="phi3", to=Path("/models/phi3"), registry="s3://bucket"))

Resolve once; read manifests and statements; hold them against trust policy and machine; choose.
Only then the first large byte moves. A registry in a folder of this machine is copied straight to
where the package goes; any other goes through the cache, so that the next pull of the same digest
moves nothing.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline import __version__
from pipeline.core.errors import Fault, RecipeError
from pipeline.registry.client.deliver import Delivery, Origin
from pipeline.registry.client.machine import Facts, Flags, facts_of
from pipeline.registry.reference import ParsedReference, parse_reference
from pipeline.registry.resolve import candidates
from pipeline.registry.select import Chosen, best
from pipeline.registry.store import Store
from pipeline.registry.stores import open_reader
from pipeline.registry.trust.machine import machine_trust
from pipeline.registry.trust.verification import Resolved, Terms

log = logging.getLogger(__name__)

ARTIFACTS = "artifacts"
"""The registry where none is named: the folder that builds publish to."""


@dataclass(frozen=True, kw_only=True)
class PullRequest:
    """What to pull or to verify, for what, and on which conditions.

    The reference is `name[/variant][:version|:channel]` or `name[/variant]@sha256:...`; to verify,
    also the folder of a package.
    """

    reference: str
    to: Path | None = None  # folder to make, to pull
    registry: str | None = None  # URL; None for `artifacts`, and to verify a folder: nowhere
    flags: Flags = field(default_factory=Flags)
    accept_unproven: bool = False  # take a package that was not accepted on this card
    allow_unsigned: bool = False
    allow_yanked: bool = False  # the reference must then name the digest
    allow_shared_parent: bool = False  # write below a folder that other users may rename in
    policy: Path | None = None  # None for the environment's, then the configuration folder's
    through_cache: bool | None = None  # None: keep a copy unless the registry is a local folder
    jobs: int | None = None  # chunks at once; None for 2 of a local folder, else 2 per core to 8
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)

    def terms(self, *, local: bool) -> Terms:
        """What is taken; this machine's own key counts for a folder of it: `local`."""
        return Terms(
            policy=machine_trust(self.environ, own_folder=local, policy=self.policy),
            allow_unsigned=self.allow_unsigned,
            allow_yanked=self.allow_yanked,
        )

    @property
    def wanted(self) -> ParsedReference:
        """The reference, parsed."""
        wanted = parse_reference(self.reference)
        if self.allow_yanked and wanted.digest is None:
            fault = f"name the package by its digest: {wanted.name}@sha256:..., not {wanted}"
            raise RecipeError([Fault("--allow-yanked", fault)])
        return wanted


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """A package that is ready to be loaded, in `dir`, which has `manifest.json` and `engine/`.

    `chosen` says why it was taken, and why others were not; `fetched_bytes` were sent now.
    """

    chosen: Chosen
    dir: Path
    registry: str
    origin: Origin | Literal["verified"]
    facts: Facts
    fetched_bytes: int = 0
    seconds: float = 0.0

    @property
    def resolved(self) -> Resolved:
        return self.chosen.resolved

    @property
    def digest(self) -> str:
        return self.resolved.package.digest

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self.resolved.package.manifest

    @property
    def engine_dir(self) -> Path:
        return self.dir / "engine"

    def to_json(self) -> dict[str, Any]:
        return {
            **self._believed(),
            "dir": str(self.dir.absolute()),
            "came_from": self.origin,
            "size_bytes": self.resolved.package.size_bytes,
            "fetched_bytes": self.fetched_bytes,
            "seconds": round(self.seconds, 3),
            "serve_args": list(self.manifest["serve"]["args"]),
            "runtime": dict(self.manifest["match"]["runtime"]),
            "format": self.manifest["format"],
            "rejected": list(self.chosen.rejected),
        }

    def receipt(self) -> bytes:
        value = {
            "schema": 1,
            "pulled": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "enginesmith": __version__,
            **self._believed(),
        }
        return (json.dumps(value, indent=1) + "\n").encode()

    def _believed(self) -> dict[str, Any]:
        proof, resolved = self.chosen.proof, self.resolved
        signer = resolved.signer
        return {
            "reference": str(self.resolved.place),
            "digest": self.digest,
            "registry": self.registry,
            "signer": signer.to_json() if signer else None,
            "unsigned_allowed": signer is None,
            "builder_id": resolved.builder_id or None,
            "verdicts": [one.to_json() for one in resolved.verdicts],
            "verdict": proof.verdict,
            "proven": proof.kind,
            "unproven_accepted": proof.kind == "unproven",
            "proven_cards": list(proof.cards),
            "facts": self.facts.to_json(),
            "unknown": list(self.chosen.unknown),
            "ignored": list(resolved.ignored),
            "yanked_accepted": resolved.yank,
        }


def run(request: PullRequest, store: Store | None = None) -> Pulled:
    """Pull what a request names, from its registry unless from an open store.

    Each kind of failure is a class of `pipeline.core.errors`.
    """
    started_s, store = time.monotonic(), store or open_reader(request.registry or ARTIFACTS)
    facts, wanted = facts_of(request.flags, request.environ), request.wanted
    found, refused = candidates(store, wanted, request.terms(local=store.local))
    chosen = best(found, refused, wanted, facts, accept_unproven=request.accept_unproven)
    for reason in chosen.rejected:
        log.info("Rejected %s", reason)
    pulled = Pulled(chosen=chosen, dir=Path(), registry=store.url, origin="registry", facts=facts)
    assert request.to is not None  # the command line demands it
    shared = request.allow_shared_parent
    delivery = Delivery(
        store=store, resolved=chosen.resolved, jobs=request.jobs, shared_parent=shared
    )
    done = delivery.to_folder(
        request.to,
        lambda origin: replace(pulled, origin=origin).receipt(),
        through_cache=not store.local if request.through_cache is None else request.through_cache,
    )
    return replace(pulled, **vars(done), seconds=time.monotonic() - started_s)
