"""Arguments and options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.registry.stores.publication import WritableStore
    from pipeline.registry.trust.policy import TrustPolicy

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Its name.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="What differs from the recipe: compiler.max_batch_size=8, acceptance.windows=12.",
        show_default=False,
    ),
]
ConfigDir = Annotated[
    Path | None, typer.Option(help="Folder with recipes of your own; ./recipes is searched too.")
]
Registry = Annotated[
    str,
    typer.Option(
        metavar="URL", help="Folder, file:///PATH, s3://BUCKET/PREFIX or oci://HOST/REPOSITORY."
    ),
]
RecipesRegistry = Annotated[
    str | None,
    typer.Option("--registry", metavar="URL", help="Where to publish; by default the recipe's."),
]
Reference = Annotated[
    str, typer.Argument(metavar="REF", help="NAME[/VARIANT][:VERSION|:CHANNEL]", show_default=False)
]
Target = Annotated[
    str,
    typer.Argument(metavar="REF|DIR", help="A package, or a pulled folder.", show_default=False),
]
TargetRegistry = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="URL",
        help="Folder, file:///PATH, s3://BUCKET/PREFIX or oci://HOST/REPOSITORY; by default "
        "artifacts.",
    ),
]
Unsigned = Annotated[
    bool, typer.Option("--allow-unsigned", help="Take a package without a signature; recorded.")
]
Policy = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Who may sign; by default $ENGINESMITH_POLICY, then ~/.config/enginesmith/"
        "policy.yaml, then this machine's own key.",
    ),
]
ARTIFACTS = "artifacts"


def open_registry(registry: str, policy: Path | None) -> tuple[WritableStore, TrustPolicy]:
    """The store that a command works on, and whose statements count there."""
    from pipeline.registry.stores import open_store
    from pipeline.registry.trust.machine import machine_trust

    store = open_store(registry)
    return store, machine_trust(os.environ, own_folder=store.local, policy=policy)
