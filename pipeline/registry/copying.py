"""Copy a package from one registry to another: the same bytes, the same signatures.

Nothing is signed again. The package and all that was said about it are verified on the way, and
read back where they arrive. Channels stay where they are: who runs a registry decides what its
`stable` is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import ConflictError, Fault, RecipeError
from pipeline.core.values import Reference
from pipeline.registry.client.progress import byte_progress
from pipeline.registry.policy import require_manifest_publishable
from pipeline.registry.reference import reference_of
from pipeline.registry.signing.machine import machine_trust
from pipeline.registry.signing.verification import verify_signatures
from pipeline.registry.statements import REPORT
from pipeline.registry.stored import require_readable
from pipeline.registry.stores.opening import open_registry, open_store
from pipeline.registry.stores.store import Place, WritableStore

log = logging.getLogger(__name__)

_TICK_S = 1.1
"""S3 tells times in whole seconds (Last-Modified), and the newest verdict on a card counts."""


@dataclass(frozen=True, kw_only=True)
class CopyRequest:
    """What to copy.

    Attributes:
        reference: As the user typed it, in the source.
        source: URL of a registry.
        target: URL of another one.
        policy: File; None for the environment's, then the configuration folder's.
        allow_unsigned: Copy a package that nobody signed.
    """

    reference: str
    source: str
    target: str
    policy: Path | None = None
    allow_unsigned: bool = False


@dataclass(frozen=True, kw_only=True)
class Copied:
    """What was copied.

    Attributes:
        reference: The same in both.
        new: False if the target had the package.
        statements: How many the target has now that it had not before, and has of the source.
        signer: Who signed the build; None if nobody did.
    """

    reference: Reference
    new: bool
    statements: tuple[int, int]
    signer: str | None

    def lines(self, request: CopyRequest) -> list[str]:
        """For people."""
        done = "Copied" if self.new else "Already there"
        added, count = self.statements
        signer = f"signed by {self.signer}" if self.signer else "UNSIGNED"
        return [
            f"{done}: {self.reference}, {signer}",
            f"digest      sha256:{self.reference.digest}",
            f"from        {request.source}",
            f"to          {request.target}",
            f"statements  {count}, {added} of them new there; no channel was moved",
        ]

    def to_json(self, request: CopyRequest) -> dict[str, Any]:
        """For programs; later versions only add."""
        return {
            "reference": str(self.reference),
            "digest": self.reference.digest,
            "from": request.source,
            "to": request.target,
            "new": self.new,
            "statements": self.statements[1],
            "statements_added": self.statements[0],
            "signer": self.signer,
            "allow_unsigned": request.allow_unsigned,
        }


def run_copy(
    request: CopyRequest,
    environ: Mapping[str, str],
    wait: Callable[[float], None] = time.sleep,
) -> Copied:
    """Copy one package with everything that was said about it.

    Args:
        request: What, from where, to where.
        environ: Names the policy and this machine's key.
        wait: Lets a coarse clock move on between two verdicts.

    Raises:
        UntrustedError: The package is not signed by somebody who counts in both places.
        CorruptError: Its bytes are wrong, here or there.
        ConflictError: The target has other bytes under this version or a statement's name.
        RecipeError: Its licence forbids it to be there, or it is a rehearsal.
        NotFoundError: There is no such package.
    """
    if request.source == request.target:
        raise RecipeError([Fault("--to", "is the same registry as --from; name another one")])
    source, store = open_registry(request.source), open_store(request.target)
    # A local key counts on this machine only: signed by it, a package is a stranger's elsewhere.
    own_folder = source.local and store.local
    policy = machine_trust(environ, own_folder=own_folder, policy=request.policy)
    store.check_writable()
    package = source.resolve(request.reference, policy=policy)
    reference = reference_of(package)
    folder = source.statements_dir(reference)
    verified = verify_signatures(package, folder, policy, allow_unsigned=request.allow_unsigned)
    require_manifest_publishable(package.manifest, public=store.public)

    held = open_store(request.source)
    place = Place.of(reference)
    oldest_first = reversed(held.statements(place))
    statements = {one.name: held.read_statement(place, one.name) for one in oldest_first}
    verdicts = {name: files for name, files in statements.items() if REPORT in files}
    before = {name: files for name, files in statements.items() if name not in verdicts}
    size_bytes = sum(file["size"] for file in package.manifest["files"])
    had = _names(store, place)
    with byte_progress(f"Copying {reference}", size_bytes) as on_bytes:
        new = store.put_package(package, before, on_bytes)
    require_readable(store, package)
    for name, files in before.items():
        _put(store, place, name, files)  # the package may have been there, and without this
    for name, files in verdicts.items():
        if _put(store, place, name, files) and len(verdicts) > 1 and not store.local:
            wait(_TICK_S)
    return Copied(
        reference=reference,
        new=new,
        statements=(len(_names(store, place) - had), len(statements)),
        signer=verified.signer.name if verified.signer else None,
    )


def _names(store: WritableStore, place: Place) -> set[str]:
    return {one.name for one in store.statements(place)}


def _put(store: WritableStore, place: Place, name: str, files: Mapping[str, bytes]) -> bool:
    """Add a statement, and read it back; whether it is new."""
    new = store.put_statement(place, name, files)
    if store.read_statement(place, name) != dict(files):
        raise ConflictError(f"{store.url}: statement {name} of {place} does not read back")
    return new
