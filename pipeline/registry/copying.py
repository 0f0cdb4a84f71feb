"""Copy a package from one registry to another: the same bytes, the same signatures.

Nothing is signed again. Signatures, provenance and test results go along, since they name the
package's digest; channels and yanks stay where they are: who runs a registry decides what its
`stable` is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import CorruptError, Fault, NotFoundError, RecipeError
from pipeline.core.progress import BYTES, progress
from pipeline.registry.client.pull import fetch
from pipeline.registry.package import require_manifest_publishable
from pipeline.registry.resolve import examine, resolve
from pipeline.registry.store import ENVELOPE, RawStatement, Store
from pipeline.registry.stores import open_reader, open_store
from pipeline.registry.trust.policy import machine_trust
from pipeline.registry.trust.statements import verified_files
from pipeline.registry.trust.verification import Resolved, Terms

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Copied:
    """What was copied: as the target has it now, whether it is new there, statements added."""

    resolved: Resolved
    new: bool
    added: int


def copy(
    reference: str,
    source_url: str,
    target_url: str,
    environ: Mapping[str, str],
    *,
    policy: Path | None = None,
    allow_unsigned: bool = False,
) -> Copied:
    """Copy one package with everything that trusted keys stated about it.

    UntrustedError if its signer is not trusted in both places, RecipeError if its licence forbids
    it to be there, or it is a rehearsal.
    """
    if source_url == target_url:
        raise RecipeError([Fault("--to", "is the same registry as --from; name another one")])
    source, target = open_reader(source_url), open_store(target_url)
    # This machine's own key counts for its own folders only: elsewhere it is a stranger's.
    trust = machine_trust(environ, own_folder=source.local and target.local, policy=policy)
    terms = Terms(policy=trust, allow_unsigned=allow_unsigned)
    target.check_writable()
    resolved = resolve(source, reference, terms)
    require_manifest_publishable(resolved.package.manifest, public=target.public)
    package = fetch(source, resolved)
    statements = _whole_statements(source, resolved)
    size_bytes = sum(file["size"] for file in package.manifest["files"])
    with progress(f"Copying {resolved.place}", size_bytes, BYTES) as on_bytes:
        new = target.put_package(package, statements, on_bytes)
    # What a package that was there already does not have.
    added = [one for one in statements if new or target.put_statement(resolved.place, one)]
    there = examine(target, resolved.place, terms, package.digest)
    return Copied(resolved=there, new=new, added=len(added))


def _whole_statements(source: Store, resolved: Resolved) -> list[RawStatement]:
    """The trusted statements that go along, with their files; oldest first."""
    found = []
    for statement in reversed(resolved.statements):
        if statement.kind == "yank":
            continue
        try:
            raw = source.read_statement(resolved.place, statement.name)
            files = verified_files(statement, raw)
        except (CorruptError, NotFoundError) as error:
            log.warning("%s of %s stays behind: %s", statement.name, resolved.place, error)
        else:
            found.append(RawStatement(name=raw.name, files={ENVELOPE: raw.envelope, **files}))
    return found
