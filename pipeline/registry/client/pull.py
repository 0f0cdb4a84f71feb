"""The straight line of a pull, and its Python API.

    from pipeline.registry import pull

    pulled = pull("phi3", to="/models/phi3", registry="s3://bucket/engines", gpu="rtx4090")
    print(pulled.engine_dir, pulled.digest)

Resolve once; read manifests and signatures; hold them against trust policy and machine; choose.
Only then the first large byte moves. A registry in a folder of this machine is copied straight to
where the package goes; any other goes through the cache, so that the next pull of the same digest
moves nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.cache import cache_root
from pipeline.core.errors import CorruptError, Fault, NotFoundError, RecipeError, UntrustedError
from pipeline.core.targets import known_targets
from pipeline.core.values import Format
from pipeline.registry.client.cache import PackageCache
from pipeline.registry.client.cache_store import CacheStore
from pipeline.registry.client.deliver import Delivery, Goal
from pipeline.registry.client.download import Transfer
from pipeline.registry.client.examine import Belief, examine
from pipeline.registry.client.machine import Facts, Flags, facts_of
from pipeline.registry.client.owned import owned_folder
from pipeline.registry.client.receipt import Came, Pulled, pulled
from pipeline.registry.client.resolve import offers
from pipeline.registry.client.retry import insistently
from pipeline.registry.client.select import Chosen, Judged, Refused, Rules, best, judge
from pipeline.registry.disk import disk_errors
from pipeline.registry.reference import ParsedReference, parse_reference
from pipeline.registry.signing.machine import machine_trust

if TYPE_CHECKING:
    from pipeline.registry.stores.store import Store

log = logging.getLogger(__name__)

_SIGNATURE_WAIT_S = 10.0
"""How long a package may be ahead of its signature, where registries are copied (ours come with
theirs)."""
_LOCAL_JOBS = 2
_REMOTE_JOBS = min(8, 2 * (os.cpu_count() or 1))
"""A connection of a distant store is slow, so that several pay; but more threads than cores cost
time: 1 GB over loopback on 2 cores took 1.45 s with 4, 1.54 with 8 (measured on 2026-11-29)."""


@dataclass(frozen=True, kw_only=True)
class PullRequest:
    """What to pull, for what, and on which conditions.

    Attributes:
        reference: `name[/variant][:version|:channel]` or `name[/variant]@sha256:...`.
        to: Folder to make; None leaves the package in the cache.
        registry: URL.
        flags: What the user says of the machine.
        format: Only this one; None for any.
        channel: In place of `stable` where the reference names none.
        accept_unproven: Take a package without a passing verdict on this card.
        allow_unsigned: Take a package that nobody signed.
        allow_yanked: Take a package that was yanked; the reference must name its digest.
        policy: File; None for the environment's, then the configuration folder's.
        offline: From the cache alone.
        through_cache: Keep a copy in the cache; None for: unless the registry is a local folder.
        jobs: Pieces at once; None for 2 of a local folder, else 2 per core, 8 at most.
        environ: The environment.
        transfer: Sizes of pieces and retries; its `jobs` do not count.
    """

    reference: str
    to: Path | None = None
    registry: str = "artifacts"
    flags: Flags = field(default_factory=Flags)
    format: Format | None = None
    channel: str | None = None
    accept_unproven: bool = False
    allow_unsigned: bool = False
    allow_yanked: bool = False
    policy: Path | None = None
    offline: bool = False
    through_cache: bool | None = None
    jobs: int | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    transfer: Transfer = field(default_factory=Transfer)


def pull(
    reference: str,
    to: str | Path | None = None,
    *,
    registry: str = "artifacts",
    gpu: str = "auto",
    runtime: str | None = None,
    vram: str | None = None,
    driver: str | None = None,
    format: Format | None = None,
    channel: str | None = None,
    accept_unproven: bool = False,
    allow_unsigned: bool = False,
    allow_yanked: bool = False,
    policy: str | Path | None = None,
    offline: bool = False,
    cache: bool | None = None,
    jobs: int | None = None,
) -> Pulled:
    """Pull a package, as `enginesmith pull` does.

    Args:
        reference: `name[/variant][:version|:channel]` or `name[/variant]@sha256:...`.
        to: Folder to make; None leaves the package in the cache.
        registry: A folder, `file:///PATH`, `s3://BUCKET/PREFIX` or `oci://HOST/REPOSITORY`.
        gpu: `auto` asks NVML; a card's id or name, `sm89`, or `none`.
        runtime: What will load it: `vllm==0.29`.
        vram: Device memory: `24GiB`.
        driver: NVIDIA driver: `580.65.06`.
        format: Only this one.
        channel: In place of `stable` where the reference names none.
        accept_unproven: Take a package without a passing verdict on this card.
        allow_unsigned: Take a package that nobody signed.
        allow_yanked: Take a package that was yanked; the reference must name its digest.
        policy: File that says who may sign.
        offline: From the cache alone: no network, no credentials.
        cache: Keep a copy in the cache; None for: unless the registry is a local folder.
        jobs: Pieces at once.

    Returns:
        Where it is and what was believed.

    Raises:
        PipelineError: See `pipeline.core.errors`: each kind of failure is a class of its own.
    """
    return run(
        PullRequest(
            reference=reference,
            to=None if to is None else Path(to),
            registry=registry,
            flags=Flags(gpu=gpu, runtime=runtime, vram=vram, driver=driver),
            format=format,
            channel=channel,
            accept_unproven=accept_unproven,
            allow_unsigned=allow_unsigned,
            allow_yanked=allow_yanked,
            policy=None if policy is None else Path(policy),
            offline=offline,
            through_cache=cache,
            jobs=jobs,
        )
    )


def run(request: PullRequest) -> Pulled:
    """Pull what a request names.

    Raises:
        RecipeError: The reference, a flag or the registry's URL cannot be read.
        NotFoundError: There is no such package.
        CorruptError: Bytes are not what they must be.
        UntrustedError: Not signed by anybody who may, revoked, or yanked.
        IncompatibleError: Nothing fits this machine, or was tried on this card.
        ConflictError: Something else is where the package is to be.
        TransientError: The connection broke too often, or the disk is full.
    """
    wanted = wanted_of(request)
    if request.offline:
        cache = PackageCache(root=cache_root())
        _require_no_channel(wanted, cache)
        return pull_from(CacheStore(cache=cache, only=wanted.digest), request)
    from pipeline.registry.stores.opening import open_store

    return pull_from(open_store(request.registry), request)


def wanted_of(request: PullRequest) -> ParsedReference:
    """The reference, with the channel of `--channel` if it names none itself.

    Raises:
        RecipeError: It is none, or names one itself.
    """
    text = request.reference
    if request.channel is not None:
        if ":" in text or "@" in text:
            fault = f"{text} says itself which version; leave one of the two out"
            raise RecipeError([Fault("--channel", fault)])
        text = f"{text}:{request.channel}"
    wanted = parse_reference(text)
    if request.allow_yanked and wanted.digest is None:
        fault = f"name the package by its digest: {wanted.name}@sha256:..., not {text}"
        raise RecipeError([Fault("--allow-yanked", fault)])
    return wanted


def _require_no_channel(wanted: ParsedReference, cache: PackageCache) -> None:
    """Offline, nobody can say where a channel points."""
    if wanted.channel is not None:
        store = CacheStore(cache=cache)
        held = [
            f"{wanted.name}/{variant}:{version}"
            for variant in store.variants(wanted.name)
            for version in store.versions(wanted.name, variant)
        ]
        raise NotFoundError(
            f"{wanted}: offline there are no channels; name a version or a digest. The cache has "
            f"{', '.join(held) or f'no {wanted.name}'}"
        )


def pull_from(store: Store, request: PullRequest) -> Pulled:
    """Pull from an open store."""
    started_s = time.monotonic()
    wanted = wanted_of(request)
    facts = facts_of(request.flags, request.environ)
    belief = Belief(
        policy=machine_trust(request.environ, own_folder=store.local, policy=request.policy),
        allow_unsigned=request.allow_unsigned,
        allow_yanked=request.allow_yanked,
        signature_wait_s=0.0 if request.offline else _SIGNATURE_WAIT_S,
    )
    with scratch_folder(request.to) as scratch:
        chosen = choose(store, wanted, facts, belief, request, scratch)

        def told(came: Came) -> Pulled:
            return pulled(
                chosen, dir=request.to or Path(), registry=store.url, came=came, facts=facts
            )

        for reason in chosen.rejected:
            log.info("Rejected %s", reason)
        through_cache = request.through_cache
        done = Delivery(
            store=store,
            candidate=chosen.judged.candidate,
            policy=belief.policy,
            transfer=_transfer(request, store),
            receipt=lambda came: told(came).receipt(),
        ).deliver(
            Goal(
                to=request.to,
                cache=PackageCache(root=cache_root()),
                through_cache=not store.local if through_cache is None else through_cache,
                offline=request.offline,
            )
        )
    return replace(
        told(done.came),
        dir=done.dir,
        fetched_bytes=done.fetched_bytes,
        seconds=time.monotonic() - started_s,
    )


def _transfer(request: PullRequest, store: Store) -> Transfer:
    jobs = request.jobs or (_LOCAL_JOBS if store.local else _REMOTE_JOBS)
    return replace(request.transfer, jobs=jobs)


def choose(
    store: Store,
    wanted: ParsedReference,
    facts: Facts,
    belief: Belief,
    request: PullRequest,
    scratch: Path,
) -> Chosen:
    """Look at all that a reference may mean, and take the best; no large byte moves.

    Raises:
        PipelineError: As in `run`.
    """
    retry = request.transfer.retry
    rules = rules_of(request)
    judged: list[Judged] = []
    refused: list[Refused] = []
    for number, offer in enumerate(
        insistently(lambda: offers(store, wanted, belief.policy), retry)
    ):
        try:
            candidate = examine(store, offer, belief, retry, scratch / str(number))
            judged.append(judge(candidate, facts, rules))
        except (CorruptError, UntrustedError, NotFoundError) as error:
            refused.append(Refused(what=str(offer.place), error=error))
    return best(judged, refused, wanted, facts)


@contextlib.contextmanager
def scratch_folder(to: Path | None) -> Iterator[Path]:
    """A private folder for small files: in the system's, else beside the goal (read-only root)."""
    try:
        parent = Path(tempfile.gettempdir())
    except FileNotFoundError:
        parent = (to or cache_root()).absolute().parent
    with contextlib.ExitStack() as stack:
        with disk_errors(f"write {parent}"):
            parent.mkdir(parents=True, exist_ok=True)
            name = f".enginesmith-pull-{os.getuid()}-"
            owned = stack.enter_context(owned_folder(parent, name))
        yield owned.dir


def rules_of(request: PullRequest) -> Rules:
    """What else the user wants."""
    return Rules(
        format=request.format,
        accept_unproven=request.accept_unproven,
        sm_of_card={target.card: target.sm for target in known_targets()},
    )
