"""Packages, the references that name them, and the registries that they are published to.

    reference.py   what users type: `smollm2:candidate`; versions that follow from the manifest
    manifest.py    `manifest.json`, whose digest names a package; a folder verified against it
    package.py     seal a folder into a package; where it may be published
    store.py       what every store can do; stores/: a folder, S3, OCI
    trust/         statements: everything signed; which of them count
    resolve.py     a reference -> a verified package; select.py: the best one for this machine
    promotion.py   channels, yanks, copies
    inventory.py   list versions, and remove what nothing needs
    client/        pull and verify

    from pipeline.registry import pull

    pulled = pull("phi3", to="/models/phi3", registry="s3://bucket/engines", gpu="rtx4090")
    print(pulled.engine_dir, pulled.digest)

Nothing here imports torch or any other builder's library.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.registry.client.pull import Pulled


def pull(
    reference: str,
    to: str | Path | None = None,
    *,
    registry: str = "artifacts",
    gpu: str = "auto",
    runtime: str | None = None,
    policy: str | Path | None = None,
    accept_unproven: bool = False,
) -> Pulled:
    """Pull a package, as `enginesmith pull` does; `pipeline.registry.client.pull` has all options.

    Raises:
        PipelineError: See `pipeline.core.errors`: each kind of failure is a class of its own.
    """
    from pipeline.registry.client.machine import Flags
    from pipeline.registry.client.pull import PullRequest, run

    return run(
        PullRequest(
            reference=reference,
            to=None if to is None else Path(to),
            registry=registry,
            flags=Flags(gpu=gpu, runtime=runtime),
            policy=None if policy is None else Path(policy),
            accept_unproven=accept_unproven,
        )
    )
