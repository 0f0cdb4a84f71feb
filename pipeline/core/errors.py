"""Every exception that this package raises on purpose, each with its exit code.

Only the entry points (`pipeline.__main__`, `pipeline.cli`) catch these. Anything else that escapes
is a bug and keeps its traceback. A missed target is a `Verdict`. A message says what was got, what
was wanted, and the next step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

# Controls but tab and line break, what turns the direction of writing, and lone surrogates.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LOGIN = re.compile(r"(?i)((?:basic|bearer)(?:\s|%20)+)[\w+/=.~-]{16,}|(?<=://)[^/@\s\"']+(?=@)")


def escaped(text: str) -> str:
    """Text by others, for a screen or a file: shown, not obeyed, and without logins that it has."""
    shown = _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)
    return _LOGIN.sub(lambda found: f"{found[1] or ''}***", shown)


def as_message(text: str) -> str:
    """Escaped, with every line but the first indented: none looks like a message of its own."""
    return re.sub(r"\n(?! )", "\n  ", escaped(text))


class ExitCode(IntEnum):
    """What a shell sees. Scripts may rely on these numbers."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_ACCEPTED = 3
    CORRUPT = 4
    UNTRUSTED = 5
    INCOMPATIBLE = 6
    NOT_FOUND = 7
    CONFLICT = 8
    TRANSIENT = 9
    INTERRUPTED = 130


class PipelineError(Exception):
    """A failure that the user can act on; exit 1 unless a subclass says otherwise."""

    exit_code: ExitCode = ExitCode.FAILED


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong in a recipe or on the command line."""

    path: str  # in the config, such as `compiler.max_batch_size`; empty for the command line
    message: str  # what was got, what is allowed, and the next step
    where: str = ""  # `FILE:LINE` that set the value; empty where no file did

    def __str__(self) -> str:
        text = f"{self.path}: {self.message}" if self.path else self.message
        return f"{text} ({self.where})" if self.where else text


class RecipeError(PipelineError):
    """The recipe, an override or the command line is wrong; carries all faults that were found."""

    exit_code = ExitCode.USAGE

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class AccessError(PipelineError):
    """The user may not read or write something: a gated repository, a folder without permission."""


class ToolError(PipelineError):
    """A tool that we started failed; `returncode` is negative for a signal."""

    def __init__(
        self,
        *,
        stage: str,
        command: Sequence[str],
        returncode: int,
        log_path: Path,
        last_lines: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        self.stage = stage
        self.returncode = returncode
        self.log_path = log_path
        lines = [f"{stage}: {command[0]} exited {returncode}; its log is {log_path}"]
        lines += [f"    {line}" for line in last_lines]
        if hint:
            lines.append(hint)
        super().__init__("\n".join(lines))


class NotAcceptedError(PipelineError):
    """A package has no test result that is good enough for where it is to go."""

    exit_code = ExitCode.NOT_ACCEPTED


class CorruptError(PipelineError):
    """Bytes are not what they claim to be: a truncated shard, a wrong digest, a broken package."""

    exit_code = ExitCode.CORRUPT


class UntrustedError(PipelineError):
    """A signature is missing, wrong, or not from a trusted signer."""

    exit_code = ExitCode.UNTRUSTED


class IncompatibleError(PipelineError):
    """This machine cannot do it: no GPU, another SM, a package that is not installed."""

    exit_code = ExitCode.INCOMPATIBLE


class OutOfMemoryError(IncompatibleError):
    """The device has too little memory for what was asked of it."""


class NotFoundError(PipelineError):
    """No such repository, commit, package or reference."""

    exit_code = ExitCode.NOT_FOUND


class ConflictError(PipelineError):
    """Other bytes exist under this name; nothing was overwritten."""

    exit_code = ExitCode.CONFLICT


class TransientError(PipelineError):
    """Trying again may work: network, rate limit, full disk."""

    exit_code = ExitCode.TRANSIENT
