"""The journal of a race: one JSON line for whatever happened, on disk before the next thing does.

    {"kind": "command", "command": 1, "at": "…", "asked": […], "before": {…}, …}
    {"kind": "load", "command": 1, "contender": "ours", "seconds": 51.2}
    {"kind": "sample", "command": 1, "peer": "vllm-bf16", "workload": "b1", "round": 0,
     "contender": "ours", "position": 0, "output_tokens_per_s": 354.1, …}
    {"kind": "failure", "command": 1, "peer": "vllm-fp8", "contender": "vllm-fp8", "message": "…"}
    {"kind": "end", "command": 1, "after": {…}, "findings": […], "stopped": "…" or null}

A race may take several commands; each appends. A round counts when both contenders have a sample of
it from the same command, so that a killed command loses one round at most. A line that a kill tore
is cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.acceptance.race.contenders import OURS
from pipeline.core.errors import ConflictError, CorruptError, Fault, RecipeError

JOURNAL = "race.jsonl"
QUESTION = "question.json"
Event = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class PairedRound:
    """Both runs of one round.

    Attributes:
        round: Its number, from 0.
        ours: The sample of ours.
        peer: The sample of the peer.
    """

    round: int
    ours: Event
    peer: Event


class Journal:
    """The journal in a folder, open for appending."""

    def __init__(self, folder: Path) -> None:
        """Read what is there; a torn last line is removed."""
        self.folder = folder
        self._path = folder / JOURNAL
        self._events = list(_read(self._path))
        self.command = sum(event["kind"] == "command" for event in self._events)

    @property
    def events(self) -> Sequence[Event]:
        """All, oldest first."""
        return tuple(self._events)

    def begin(self, **values: Any) -> None:
        """A new command; later events carry its number."""
        self.command += 1
        self.add("command", **values)

    def add(self, kind: str, **values: Any) -> None:
        """Append one event and force it to the disk."""
        event = {"kind": kind, "command": self.command, **values}
        data = (json.dumps(event) + "\n").encode()
        with self._path.open("ab") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        self._events.append(event)

    def rounds(self, peer: str, workload: str) -> tuple[PairedRound, ...]:
        """The complete rounds of a pair at a workload, by their number."""
        return paired_rounds(self._events, peer, workload)

    def missing(self, peer: str, workload: str, rounds: int) -> tuple[int, ...]:
        """Numbers of the rounds below `rounds` that are not complete."""
        done = {found.round for found in self.rounds(peer, workload)}
        return tuple(number for number in range(rounds) if number not in done)


def paired_rounds(events: Sequence[Event], peer: str, workload: str) -> tuple[PairedRound, ...]:
    """As `Journal.rounds`; of a round that is there twice, the first counts."""
    sides: dict[tuple[int, int], dict[str, Event]] = {}
    for event in events:
        if event["kind"] == "sample" and (event["peer"], event["workload"]) == (peer, workload):
            sides.setdefault((event["round"], event["command"]), {})[event["contender"]] = event
    complete: dict[int, PairedRound] = {}
    for (number, _), found in sorted(sides.items()):
        if OURS in found and peer in found and number not in complete:
            complete[number] = PairedRound(round=number, ours=found[OURS], peer=found[peer])
    return tuple(complete.values())


def _read(path: Path) -> Iterator[Event]:
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as stream:
            stream.truncate(len(whole))
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            event = json.loads(line)
            event["kind"], event["command"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(
                f"{path}, line {number} is no event of a race; move the folder away and race again"
            ) from error
        yield event


def require_folder(folder: Path, *, resume: bool) -> None:
    """What can be said of the folder before anything is made for it.

    Raises:
        ConflictError: It holds something else, or a race and `resume` is not set.
        RecipeError: There is nothing to continue.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        if resume:
            raise RecipeError([Fault("--resume", f"{folder} holds no race; leave --resume out")])
        return
    if not (folder / QUESTION).is_file():
        raise ConflictError(f"{folder} holds no race; name another folder with --out")
    if not resume:
        raise ConflictError(
            f"{folder} holds a race; continue it with --resume, or name another folder with --out"
        )


def open_journal(folder: Path, question: Mapping[str, Any], *, resume: bool) -> Journal:
    """The journal of a race in `folder`, new or continued.

    Args:
        folder: Made when it is missing.
        question: What is raced, as JSON values; only the same question is continued.
        resume: Continue what is there.

    Raises:
        ConflictError: The folder holds another race, or any race and `resume` is not set.
        RecipeError: There is nothing to continue.
    """
    require_folder(folder, resume=resume)
    path = folder / QUESTION
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        private = folder / f".{QUESTION}"
        private.write_text(json.dumps(question, indent=1) + "\n")
        private.replace(path)
        return Journal(folder)
    before = json.loads(path.read_text())
    if changed := [key for key in question if before.get(key) != question[key]]:
        told = "; ".join(f"{key} was {before.get(key)!r}, is {question[key]!r}" for key in changed)
        raise ConflictError(
            f"{folder} holds another race: {told}; what is not the same cannot be compared, name "
            "another folder with --out"
        )
    return Journal(folder)
