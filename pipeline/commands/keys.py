"""Commands about keys: keygen, policy, sign."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.answer import Answer, answering
from pipeline.commands.arguments import ARTIFACTS, Policy, Reference, Registry, open_registry


@answering
def keygen(
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="By default signing.key in ~/.config/enginesmith."),
    ] = None,
) -> Answer:
    """Make a key pair to sign packages with."""
    from pipeline.registry.trust.keys import KEY_PATH, config_root, generate_key, write_key_pair

    path = out if out is not None else config_root(os.environ) / "signing.key"
    key = generate_key()
    public = write_key_pair(key, path)
    return Answer(
        value={
            "private_key": str(path.absolute()),
            "public_key": str(public.absolute()),
            "keyid": key.public.keyid,
        },
        shown=[
            f"private key {path} (mode 0600; sign with {KEY_PATH}={path})",
            f"public key  {public} (for enginesmith policy)",
            f"key id      {key.public.keyid}",
        ],
    )


@answering
def policy(
    keys: Annotated[
        list[Path],
        typer.Argument(metavar="KEY.pub...", help="Public keys.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Replaces nothing.")] = Path(
        "policy.yaml"
    ),
) -> Answer:
    """Write a trust policy that gives every right to these keys."""
    from pipeline.core.errors import ConflictError
    from pipeline.registry.disk import disk_errors, write_new
    from pipeline.registry.trust.keys import read_public_key
    from pipeline.registry.trust.policy import policy_text
    from pipeline.registry.trust.signatory import POLICY_PATH

    named = {path.name.removesuffix(".pub").removesuffix(".key"): path for path in keys}
    text = policy_text({name: read_public_key(path) for name, path in named.items()})
    with disk_errors(f"write {out}"):
        try:
            write_new(out, text.encode())
        except FileExistsError:
            raise ConflictError(f"{out} exists; edit it, or choose another with --out") from None
    return Answer(
        value={"policy": str(out.absolute()), "keys": list(named)},
        shown=[f"policy {out} trusts {', '.join(named)} (use it with {POLICY_PATH}={out})"],
    )


@answering
def sign(
    reference: Reference,
    key: Annotated[
        Path,
        typer.Option(metavar="PATH", help="A private key of enginesmith keygen."),
    ],
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
) -> Answer:
    """Sign a package that is trusted here, and its test results, with another key."""
    from pipeline.registry.promotion import countersign
    from pipeline.registry.trust.keys import read_private_key

    store, trust = open_registry(registry, policy)
    signing = read_private_key(key)
    found = countersign(store, reference, signing, trust)
    return Answer(
        value={
            "reference": str(found.reference),
            "digest": found.package.digest,
            "keyid": signing.public.keyid,
        },
        shown=[f"{found.place} is signed by key {signing.public.keyid[:12]}, too"],
    )
