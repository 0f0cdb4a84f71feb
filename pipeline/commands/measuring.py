"""Commands that measure: accept, race."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.answer import Answer, answer_of, answering, file_logging, screen_logging
from pipeline.commands.arguments import (
    ARTIFACTS,
    ConfigDir,
    Overrides,
    Policy,
    Recipe,
    Registry,
    Unsigned,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from pipeline.race import RaceResult


@answering
def accept(
    target: Annotated[
        str, typer.Argument(metavar="REF|DIR", help="A package.", show_default=False)
    ],
    overrides: Overrides = None,
    registry: Registry = ARTIFACTS,
    publish: Annotated[
        bool, typer.Option("--publish", help="Add the signed result to a remote registry, too.")
    ] = False,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="By default the package's own.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the report goes, beside the registry.")
    ] = None,
    policy: Policy = None,
    allow_unsigned: Unsigned = False,
    config_dir: ConfigDir = None,
) -> Answer:
    """Measure a package on this machine's GPU, and sign what came of it."""
    from pipeline.accept import AcceptRequest
    from pipeline.accept import accept as run
    from pipeline.outcome import failure_of, open_run, write_verdict
    from pipeline.registry.stores import folder_of

    request = AcceptRequest(
        target=target,
        registry=registry,
        publish=publish,
        overrides=tuple(overrides or ()),
        recipe=recipe,
        policy=policy,
        allow_unsigned=allow_unsigned,
        config_dir=config_dir,
    )
    run_dir = out or open_run(folder_of(registry) or Path(ARTIFACTS))
    run_dir.mkdir(parents=True, exist_ok=True)
    with screen_logging(), file_logging(run_dir / "accept.log"):
        try:
            outcome = run(request, run_dir)
        except (Exception, KeyboardInterrupt) as error:
            outcome = failure_of(error)
    document = outcome.to_json(target, request.overrides)
    write_verdict(run_dir, document)
    return answer_of(outcome, document)


_Only = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,…",
        help="Peers: vllm-bf16, vllm-fp8, transformers; by default all that run here.",
    ),
]
_Workloads = Annotated[
    str | None,
    typer.Option(
        metavar="bN,…",
        help="Batches; by default b1,b8,b64,b128 up to compiler.max_batch_size (CPU: b1,b8).",
    ),
]


@answering
def race(
    recipe: Recipe,
    overrides: Overrides = None,
    cpu: Annotated[
        bool,
        typer.Option(
            "--cpu", help="Race on this CPU: the graph in ONNX Runtime against Transformers."
        ),
    ] = False,
    only: _Only = None,
    workloads: _Workloads = None,
    isl: Annotated[
        int | None, typer.Option(min=1, help="Tokens of every prompt; 128 (CPU: 64).")
    ] = None,
    osl: Annotated[
        int | None, typer.Option(min=1, help="Output tokens of every request; 256 (CPU: 64).")
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="Timed rounds of each pair; transformers on a GPU: 3 at most."),
    ] = 10,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights", help="Race on random weights of the shape; downloads nothing."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="By default artifacts/.runs/race-RECIPE."),
    ] = None,
    config_dir: ConfigDir = None,
) -> Answer:
    """Race a recipe's artifact against vLLM and Transformers on this machine."""
    from pipeline.race import RaceRequest
    from pipeline.race import race as run

    request = RaceRequest(
        recipe=recipe,
        overrides=tuple(overrides or ()),
        cpu=cpu,
        only=tuple(dict.fromkeys(_listed(only))),
        batches=tuple(_batch(name) for name in _listed(workloads)),
        isl=isl,
        osl=osl,
        rounds=rounds,
        random_weights=random_weights,
        out=out or Path(ARTIFACTS) / ".runs" / f"race-{recipe}",
        config_dir=config_dir,
    )
    with screen_logging():
        return race_answer(run(request))


def race_answer(result: RaceResult) -> Answer:
    """1 where a peer failed; 3 where what was measured is worth nothing, as on a shared card."""
    from pipeline.core.errors import ExitCode

    code = ExitCode.OK if result.verdict.name == "measured" else ExitCode.NOT_ACCEPTED
    lines = [f"{result.verdict.name}: {result.report}"]
    lines += [f"{one.kind}: {one.message}" for one in result.verdict.findings]
    return Answer(
        value=result.document,
        shown=[_table(result.document), *lines],
        exit_code=ExitCode.FAILED if result.failed else code,
        message="\n".join(lines),
    )


def _table(document: Mapping[str, Any]) -> Table:
    """Median rates, and ours over each peer with its interval, by workload."""
    from rich.table import Table

    entries = document["speed"]
    table = Table("output tok/s, median", *(entry["workload"] for entry in entries))
    table.add_row("ours", *(f"{entry['output_tokens_per_s']:,.1f}" for entry in entries))
    labels = {
        name: peer["label"] for entry in entries for name, peer in entry.get("peers", {}).items()
    }
    for name, label in labels.items():
        peers = [entry["peers"].get(name) for entry in entries]
        rates = (f"{peer['output_tokens_per_s']:,.1f}" if peer else "-" for peer in peers)
        table.add_row(label, *rates)
        table.add_row("  ours / peer", *(_ratio(peer["ratio"]) if peer else "-" for peer in peers))
    return table


def _ratio(ratio: Mapping[str, Any]) -> str:
    """The median and its interval, such as `1.171 (1.168 to 1.174)`."""
    if ratio["low"] is None:
        return f"{ratio['median']:.3f}"
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def _listed(value: str | None) -> list[str]:
    return [name.strip() for name in (value or "").split(",") if name.strip()]


def _batch(name: str) -> int:
    """The batch of `b8`.

    Raises:
        RecipeError: It is written otherwise.
    """
    from pipeline.core.errors import Fault, RecipeError

    if not re.fullmatch(r"b[1-9][0-9]{0,4}", name):
        fault = f"{name!r} is no workload; write b and the batch, such as b1,b8,b64"
        raise RecipeError([Fault("--workloads", fault)])
    return int(name[1:])
