"""Commands that measure what is built: accept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.answer import Answer, answer_of, answering
from pipeline.commands.arguments import ARTIFACTS, ConfigDir, Overrides, Policy, Registry


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
    allow_unsigned: Annotated[
        bool, typer.Option("--allow-unsigned", help="Take a package that nobody signed.")
    ] = False,
    config_dir: ConfigDir = None,
) -> Answer:
    """Measure a package on this machine's GPU, and sign what came of it."""
    from pipeline.accept import AcceptRequest
    from pipeline.accept import accept as run
    from pipeline.commands.screen import file_logging, screen_logging
    from pipeline.outcome import failure_of, open_run, write_verdict
    from pipeline.registry.stores.opening import folder_of

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
