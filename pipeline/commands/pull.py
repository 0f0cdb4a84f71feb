"""Bring an engine to where it is served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.answer import Answer, answering, screen_logging
from pipeline.commands.arguments import Policy, TargetRegistry, Unsigned

if TYPE_CHECKING:
    from pipeline.registry.client.pull import Pulled

CARDS = "auto|CARD|sm89|none"
Runtime = Annotated[
    str | None, typer.Option(metavar="NAME==VERSION", help="What will load it: vllm==0.29.")
]
Vram = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Device memory that it may use: 24GiB.")
]
Driver = Annotated[str | None, typer.Option(metavar="VERSION", help="NVIDIA driver: 580.65.06.")]
Unproven = Annotated[
    bool, typer.Option("--accept-unproven", help="Take what did not pass on this card; recorded.")
]
Yanked = Annotated[
    bool, typer.Option("--allow-yanked", help="Take a yanked package, by its digest; recorded.")
]
_Wanted = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="NAME[/VARIANT][:VERSION|:CHANNEL] or NAME@sha256:DIGEST; without a variant the "
        "best for the machine.",
        show_default=False,
    ),
]
_To = Annotated[
    Path, typer.Option(metavar="DIR", help="Folder to make, or an empty one.", show_default=False)
]
_Gpu = Annotated[
    str,
    typer.Option(
        metavar=CARDS,
        help="What will run it: auto asks NVML; rtx4090, NVIDIA-GeForce-RTX-4090 or sm89 is "
        "taken as given; none checks nothing of it.",
    ),
]
_SharedParent = Annotated[
    bool,
    typer.Option(
        "--allow-shared-parent",
        help="Write below a folder that other users may rename in, such as a pod's volume.",
    ),
]
_Cache = Annotated[
    bool | None,
    typer.Option(
        "--cache/--no-cache",
        help="Keep a copy in the cache; by default unless the registry is a local folder.",
    ),
]
_Jobs = Annotated[int | None, typer.Option(min=1, max=64, help="Chunks that are fetched at once.")]


@answering
def pull(
    reference: _Wanted,
    to: _To,
    registry: TargetRegistry = None,
    gpu: _Gpu = "auto",
    runtime: Runtime = None,
    vram: Vram = None,
    driver: Driver = None,
    accept_unproven: Unproven = False,
    allow_unsigned: Unsigned = False,
    allow_yanked: Yanked = False,
    allow_shared_parent: _SharedParent = False,
    policy: Policy = None,
    cache: _Cache = None,
    jobs: _Jobs = None,
) -> Answer:
    """Fetch the engine that fits a machine, every byte verified."""
    from pipeline.registry.client import pull as client
    from pipeline.registry.client.machine import Flags

    request = client.PullRequest(
        reference=reference,
        to=to,
        registry=registry,
        flags=Flags(gpu=gpu, runtime=runtime, vram=vram, driver=driver),
        accept_unproven=accept_unproven,
        allow_unsigned=allow_unsigned,
        allow_yanked=allow_yanked,
        allow_shared_parent=allow_shared_parent,
        policy=policy,
        through_cache=cache,
        jobs=jobs,
    )
    with screen_logging():
        done = client.run(request)
    return Answer(value=done.to_json(), shown=lines_of(done))


def lines_of(done: Pulled) -> list[str]:
    """What was checked, for people."""
    resolved, chosen = done.resolved, done.chosen
    how = {
        "registry": f"fetched {done.fetched_bytes / 1e6:.1f} MB in {done.seconds:.1f} s",
        "cache": "from the cache",
        "present": "it was there already",
        "verified": "verified where it is",
    }[done.origin]
    needs, yank = done.manifest["match"]["runtime"], resolved.yank
    return [
        f"package   {resolved.place}",
        f"digest    sha256:{done.digest}",
        f"bytes     {resolved.package.size_bytes / 1e6:.1f} MB, every byte verified; {how}",
        f"signed    {resolved.signer or 'UNSIGNED, accepted because of --allow-unsigned'}",
        f"built     {resolved.builder_id or 'no trusted provenance'}",
        f"proven    {_proof_line(done)}",
        *([f"yanked    YANKED {yank}; accepted because of --allow-yanked"] if yank else []),
        f"runtime   {needs['name']} {needs['version']}",
        f"engine    {done.engine_dir}",
        *(f"unknown   {text}" for text in chosen.unknown),
        *(f"rejected  {text}" for text in chosen.rejected),
        *(f"ignored   {text}" for text in resolved.ignored),
    ]


def _proof_line(done: Pulled) -> str:
    proof = done.chosen.proof
    if proof.kind == "proven":
        return f"{proof.verdict} on {done.facts.card}"
    if proof.kind == "unknown":
        return f"accepted on {', '.join(proof.cards)}; the card here is not known"
    allowed = "" if done.facts.card is None else "UNPROVEN here, taken with --accept-unproven: "
    return f"{allowed}{proof.why}"
