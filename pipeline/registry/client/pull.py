"""The straight line of a pull, and its Python API.

    from pipeline.registry import pull

    pulled = pull("phi3", to="/models/phi3", registry="s3://bucket/engines", gpu="rtx4090")
    print(pulled.engine_dir, pulled.digest)

Resolve once; read manifests and statements; hold them against trust policy and machine; choose.
Only then the first large byte moves. A registry in a folder of this machine is copied straight to
where the package goes; any other goes through the cache, so that the next pull of the same digest
moves nothing.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.core.errors import Fault, NotFoundError, RecipeError
from pipeline.core.values import Format, Package
from pipeline.registry.client.cache import package_cache
from pipeline.registry.client.deliver import Delivery
from pipeline.registry.client.download import Transfer
from pipeline.registry.client.machine import Flags, facts_of
from pipeline.registry.client.receipt import Pulled
from pipeline.registry.package import verify
from pipeline.registry.reference import ParsedReference, parse_reference
from pipeline.registry.resolve import Resolved, Terms, candidates
from pipeline.registry.select import best
from pipeline.registry.store import Store
from pipeline.registry.stores.opening import open_store, package_dir
from pipeline.registry.trust.signatory import machine_trust

log = logging.getLogger(__name__)

ARTIFACTS = "artifacts"
"""The registry where none is named: the folder that builds publish to."""

_LOCAL_JOBS = 2
_REMOTE_JOBS = min(8, 2 * (os.cpu_count() or 1))
"""A connection of a distant store is slow, so that several pay; but more threads than cores cost
time: 1 GB over loopback on 2 cores took 1.45 s with 4, 1.54 with 8 (measured on 2026-11-29)."""


@dataclass(frozen=True, kw_only=True)
class PullRequest:
    """What to pull or to verify, for what, and on which conditions.

    Attributes:
        reference: `name[/variant][:version|:channel]` or `name[/variant]@sha256:...`; to verify,
            also the folder of a package.
        to: Folder to make; None leaves the package in the cache.
        registry: URL; None for `artifacts`, and for a folder that is verified: nowhere.
        flags: What the user says of the machine.
        format: Only this one; None for any.
        channel: In place of `stable` where the reference names none.
        accept_unproven: Take a package that was not accepted on this card.
        allow_unsigned: Take a package without a signature.
        allow_yanked: Take a package that was yanked; the reference must name its digest.
        allow_shared_parent: Write below a folder that other users may rename in.
        policy: File; None for the environment's, then the configuration folder's.
        offline: From the cache alone.
        through_cache: Keep a copy in the cache; None for: unless the registry is a local folder.
        jobs: Chunks at once; None for 2 of a local folder, else 2 per core, 8 at most.
        environ: The environment.
        transfer: Sizes of chunks and retries; its `jobs` do not count.
    """

    reference: str
    to: Path | None = None
    registry: str | None = None
    flags: Flags = field(default_factory=Flags)
    format: Format | None = None
    channel: str | None = None
    accept_unproven: bool = False
    allow_unsigned: bool = False
    allow_yanked: bool = False
    allow_shared_parent: bool = False
    policy: Path | None = None
    offline: bool = False
    through_cache: bool | None = None
    jobs: int | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    transfer: Transfer = field(default_factory=Transfer)

    def terms(self, *, local: bool) -> Terms:
        """Whom this pull trusts, and what it takes all the same.

        A local key counts for a package in a folder of this machine: `local`.
        """
        return Terms(
            policy=machine_trust(self.environ, own_folder=local, policy=self.policy),
            allow_unsigned=self.allow_unsigned,
            allow_yanked=self.allow_yanked,
        )


def pull(
    reference: str,
    to: str | Path | None = None,
    *,
    registry: str = ARTIFACTS,
    gpu: str = "auto",
    runtime: str | None = None,
    policy: str | Path | None = None,
    accept_unproven: bool = False,
) -> Pulled:
    """Pull a package, as `enginesmith pull` does; `run` takes all its options.

    The arguments are those of `PullRequest`; `gpu` and `runtime` those of `Flags`.

    Returns:
        Where it is and what was believed.

    Raises:
        PipelineError: See `pipeline.core.errors`: each kind of failure is a class of its own.
    """
    request = PullRequest(
        reference=reference,
        to=None if to is None else Path(to),
        registry=registry,
        flags=Flags(gpu=gpu, runtime=runtime),
        policy=None if policy is None else Path(policy),
        accept_unproven=accept_unproven,
    )
    return run(request)


def run(request: PullRequest) -> Pulled:
    """Pull what a request names.

    Raises:
        RecipeError: The reference, a flag or the registry's URL cannot be read.
        NotFoundError: There is no such package.
        CorruptError: Bytes are not what they must be.
        UntrustedError: Not signed by a trusted key, revoked, or yanked.
        IncompatibleError: Nothing fits this machine, or was accepted on this card.
        ConflictError: Something else is where the package is to be.
        AccessError: Another user could replace what is written.
        TransientError: The connection broke too often or is too slow, or the disk is full.
    """
    wanted = wanted_of(request)
    if not request.offline:
        return pull_from(open_store(request.registry or ARTIFACTS), request)
    store = package_cache().store
    if wanted.channel is not None:
        held = ", ".join(map(str, store.places(wanted.name)))
        raise NotFoundError(
            f"{wanted}: offline there are no channels; name a version or a digest. The cache has "
            f"{held or f'no {wanted.name}'}"
        )
    return pull_from(store, request)


def wanted_of(request: PullRequest) -> ParsedReference:
    """The reference, with the channel of `--channel` if it names none itself.

    Raises:
        RecipeError: It is none, or names a version or channel itself.
    """
    text = request.reference
    if request.channel is not None:
        if ":" in text or "@" in text:
            fault = f"{text} already names a version; leave one of the two out"
            raise RecipeError([Fault("--channel", fault)])
        text = f"{text}:{request.channel}"
    wanted = parse_reference(text)
    if request.allow_yanked and wanted.digest is None:
        fault = f"name the package by its digest: {wanted.name}@sha256:..., not {text}"
        raise RecipeError([Fault("--allow-yanked", fault)])
    return wanted


def pull_from(store: Store, request: PullRequest) -> Pulled:
    """Pull from an open store."""
    started_s = time.monotonic()
    wanted = wanted_of(request)
    facts = facts_of(request.flags, request.environ)
    found, refused = candidates(store, wanted, request.terms(local=store.local))
    chosen = best(
        found,
        refused,
        wanted,
        facts,
        format=request.format,
        accept_unproven=request.accept_unproven,
    )
    for reason in chosen.rejected:
        log.info("Rejected %s", reason)
    pulled = Pulled(
        chosen=chosen,
        dir=request.to or Path(),
        registry=store.url,
        origin="registry",
        facts=facts,
    )
    delivery = delivery_of(store, chosen.resolved, request)
    if request.to is None:
        package, fetched_bytes = delivery.to_cache()
        pulled = replace(pulled, dir=package.dir, origin="registry" if fetched_bytes else "cache")
    else:
        through_cache = request.through_cache
        done = delivery.to_folder(
            request.to,
            lambda origin: replace(pulled, origin=origin).receipt(),
            through_cache=not store.local if through_cache is None else through_cache,
        )
        fetched_bytes = done.fetched_bytes
        pulled = replace(pulled, dir=done.dir, origin=done.origin)
    return replace(pulled, fetched_bytes=fetched_bytes, seconds=time.monotonic() - started_s)


def delivery_of(store: Store, resolved: Resolved, request: PullRequest) -> Delivery:
    """How a request brings a package here."""
    jobs = request.jobs or (_LOCAL_JOBS if store.local else _REMOTE_JOBS)
    return Delivery(
        store=store,
        resolved=resolved,
        cache=package_cache(),
        transfer=replace(request.transfer, jobs=jobs),
        offline=request.offline,
        shared_parent=request.allow_shared_parent,
    )


def fetch(store: Store, resolved: Resolved) -> Package:
    """A resolved package in a folder of this machine, every byte verified, ready to be loaded.

    Raises:
        CorruptError: Its bytes are not what its manifest says.
        TransientError: The connection broke too often, or the disk is full.
    """
    if folder := package_dir(store, resolved.place):
        return verify(folder)
    return delivery_of(store, resolved, PullRequest(reference="")).to_cache()[0]
