"""What a run ends with, and where that is written: verdict.json, `$GITHUB_OUTPUT`, the screen.

Every run, also one that was refused, leaves `<registry>/.runs/<time>-<pid>/verdict.json`; the link
`latest` beside it points to the newest run.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import ExitCode, Fault, PipelineError, RecipeError, escaped
from pipeline.core.ownership import REGISTRY, make_own
from pipeline.registry.reference import reference_of

if TYPE_CHECKING:
    from pipeline.core.published import Package, VerdictName
    from pipeline.core.values import Verdict

log = logging.getLogger(__name__)

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one job.

    `reference` and `digest` (without a prefix) are of what was published or taken; `taken`: nothing
    was built, a package with this build key was published before.
    """

    exit_code: ExitCode
    message: str
    verdict: VerdictName | None = None
    reference: str | None = None
    digest: str | None = None
    report: Path | None = None
    package_dir: Path | None = None
    size_bytes: int | None = None
    seconds: float = 0.0
    taken: bool = False
    faults: tuple[Fault, ...] = ()

    def to_json(self, recipe: str, overrides: Iterable[str]) -> dict[str, Any]:
        """`verdict.json` of one job; later versions only add."""
        return {
            "schema": 1,
            "recipe": recipe,
            "overrides": list(overrides),
            **asdict(self),
            "exit_code": int(self.exit_code),
            "report": str(self.report.absolute()) if self.report else None,
            "package_dir": str(self.package_dir.absolute()) if self.package_dir else None,
            "seconds": round(self.seconds, 3),
            "faults": [asdict(fault) for fault in self.faults],
        }


def refusal_of(faults: Sequence[Fault]) -> Outcome:
    """The outcome of a recipe with faults."""
    lines = [str(fault) for fault in faults]
    if len(lines) > 1:
        lines = [f"{len(lines)} faults, nothing is built:", *(f"  {line}" for line in lines)]
    return Outcome(exit_code=ExitCode.USAGE, message="\n".join(lines), faults=tuple(faults))


def outcome_of(
    package: Package, verdict: Verdict, report: Path, done: str = "", *, taken: bool = False
) -> Outcome:
    """The outcome of a package that reached a verdict; `done` is the message's first line."""
    reference = str(reference_of(package))
    done = done or f"{'Taken, published before' if taken else 'Published'}: {reference}"
    failing = [found for found in verdict.findings if found.kind != "note"]
    return Outcome(
        exit_code=ExitCode.OK if verdict.passed else ExitCode.NOT_ACCEPTED,
        message="\n".join([done, *(f"  {found.message}" for found in failing)]),
        verdict=verdict.name,
        reference=reference,
        digest=package.digest,
        report=report,
        package_dir=package.dir,
        size_bytes=package.size_bytes,
        taken=taken,
    )


def failure_of(error: BaseException) -> Outcome:
    """The outcome of a job that ended with an exception.

    What we raise on purpose, a package that is not installed, a full disk and missing permissions
    have a message and a code of their own. Anything else is a bug: its traceback is the message.
    """
    if isinstance(error, RecipeError):
        return refusal_of(error.faults)
    if isinstance(error, PipelineError):
        return Outcome(exit_code=error.exit_code, message=str(error))
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("pipeline"):
        needs = f"this needs {error.name}, which is not installed here"
        message = f"{needs}: run pip install '.[build]' in the checkout"
        return Outcome(exit_code=ExitCode.INCOMPATIBLE, message=message)
    if isinstance(error, KeyboardInterrupt):
        return Outcome(exit_code=ExitCode.INTERRUPTED, message="stopped before it was done")
    where = getattr(error, "filename", None) or "the file system"
    # The safetensors library has only words for a full disk.
    if getattr(error, "errno", None) in _FULL or "No space left on device" in str(error):
        message = (
            f"disk full at {where}; free some space, or set ENGINESMITH_CACHE to a folder on a "
            "larger disk, and run the same command again"
        )
        return Outcome(exit_code=ExitCode.TRANSIENT, message=message)
    if isinstance(error, OSError) and (error.filename or error.errno in _DISK):
        message = f"cannot write or read {where}: {error.strerror}; change its owner, or remove it"
        return Outcome(exit_code=ExitCode.FAILED, message=message)
    trace = "".join(traceback.format_exception(error)).rstrip()
    return Outcome(exit_code=ExitCode.FAILED, message=f"this is a bug in enginesmith\n{trace}")


def open_run(registry_dir: Path) -> Path:
    """Make the folder of this run, and let `latest` point to it; raises like `make_own`."""
    runs = registry_dir / ".runs"
    # Microseconds, since containers that share a folder may share a process id as well.
    time = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    run_dir = runs / f"{time}Z-{os.getpid()}"
    make_own(run_dir, REGISTRY, 0o775, team=True)
    link = runs / f".latest-{run_dir.name}"
    try:
        link.symlink_to(run_dir.name)
        link.replace(runs / "latest")
    except OSError as error:  # some network file systems have no links
        log.debug("%s does not point to this run: %s", runs / "latest", error)
    return run_dir


def write_verdict(run_dir: Path, document: Mapping[str, Any]) -> None:
    """Write `verdict.json` in one step; a full disk is only told, since the run is over."""
    private = run_dir / ".verdict.json"
    try:
        private.write_text(escaped(json.dumps(document, indent=1)) + "\n")
        private.replace(run_dir / "verdict.json")
    except OSError as error:
        log.warning("Cannot write %s: %s", run_dir / "verdict.json", error)


def append_github_output(document: Mapping[str, Any]) -> None:
    """Append the verdict to the file that `$GITHUB_OUTPUT` names, if it is set."""
    path = os.environ.get("GITHUB_OUTPUT")
    if not path:
        return
    # A random end mark, so that no tool's output can end a value and set other keys.
    mark, text = f"end-{secrets.token_hex(16)}", ""
    for key in ("exit_code", "verdict", "reference", "digest", "report", "message"):
        value = document.get(key)
        text += f"{key}<<{mark}\n{'' if value is None else escaped(str(value))}\n{mark}\n"
    try:
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        log.warning("Cannot write $GITHUB_OUTPUT: %s", error)


def closing_lines(outcome: Outcome, generate: str) -> str:
    """The last lines of a job that reached a verdict; `generate` talks to its package."""
    rows = {
        "verdict": outcome.verdict,
        "size": outcome.size_bytes and f"{outcome.size_bytes / 1e6:.1f} MB",
        "digest": f"sha256:{outcome.digest}" if outcome.digest else None,
        "package": outcome.reference,
        "path": outcome.package_dir,
        "report": outcome.report,
        "try": generate if outcome.reference else None,
    }
    return "\n".join(f"{name:<8} {value}" for name, value in rows.items() if value)
