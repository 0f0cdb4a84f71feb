"""race.json from the journal: pure, so that a report can be made again at any time.

Schema 1; later versions only add:

    schema, recipe, random_weights, verdict, statement
    card                   as NVML calls it, spaces as dashes; `target`: the card of the recipe
    on_target              whether they are the same; if not, no ratio says anything of `target`
    engine, weights        digests of our artifact and of the source
    workloads[]            name, batch, isl, osl
    contenders{}           name -> label, arguments, memory_bytes (estimated)
    throughput[]           contender, workload, batch, output_tokens_per_s (median of all its runs),
                           runs, ttft_ms, itl_ms, joules_per_token (medians; null if not known)
    pairs[]                peer, state (complete, partial, failed, missing), rounds, failure, and
                           workloads[]: workload, ratio {median, low, high, level, rounds},
                           ours and peer: raw output_tokens_per_s by round
    ceilings[]             workload, output_tokens_per_s: the roofline of our artifact on this card
                           (pipeline.acceptance.physics); empty where the card is not known
    commands[]             what each command ran on: conditions before and after, tools, findings
    not_raced{}            contender -> why it did not run at all
    findings[]             kind, message
    next_command           what goes on where something is missing, else null

`verdict`: `measured`; `incomplete`, some rounds are missing; `inconclusive`, the card was not ours
alone; `anomalous`, a rate that the card cannot have. A ratio is ours over the peer, per round, and
the median over rounds with its 95 % bootstrap interval (pipeline.acceptance.race.ratios).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.acceptance.measure import PHYSICS
from pipeline.acceptance.physics import MeasuredRate, judge_physics, run_ceiling
from pipeline.acceptance.race.contenders import OURS
from pipeline.acceptance.race.journal import Event, paired_rounds
from pipeline.acceptance.race.ratios import paired_ratio
from pipeline.core.values import Finding
from pipeline.plan.ceilings import Roofline


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the report says beside what the journal holds.

    Attributes:
        target: Id of the recipe's card; `target_card` is NVML's name of it.
        target_card: See `target`.
        roofline: Our artifact on the card that was raced on; None where that is not known.
        not_raced: Contender -> why it did not run at all.
        next_command: The command that goes on.
    """

    target: str
    target_card: str
    roofline: Roofline | None = None
    not_raced: Mapping[str, str] = field(default_factory=dict)
    next_command: str = ""


def report_of(
    question: Mapping[str, Any], events: Sequence[Event], context: Context
) -> dict[str, Any]:
    """The document; see the module.

    Args:
        question: What is raced (`question.json`).
        events: Of the journal.
        context: The rest.
    """
    asked = asked_rounds(events)
    workloads = question["workloads"]
    pairs = [_pair(events, peer, rounds, workloads) for peer, rounds in asked.items()]
    throughput = list(_throughput(events, workloads))
    loads = [
        MeasuredRate(
            name=row["workload"],
            output_tokens_per_s=row["output_tokens_per_s"],
            **{name: load[name] for name in ("batch", "isl", "osl")},
        )
        for row in throughput
        for load in workloads
        if row["contender"] == OURS and load["name"] == row["workload"]
    ]
    commands = list(_commands(events))
    raced = [command for command in commands if command["samples"]]
    findings = [finding for command in raced for finding in command["findings"]]
    ceilings = []
    if (line := context.roofline) is not None:
        # A small share of the ceiling is no finding here: the race is between runtimes.
        found = [one for one in judge_physics(loads, line, PHYSICS) if one.kind != "note"]
        findings += [finding.to_json() for finding in found]
        ceilings = [_ceiling(load, line) for load in workloads]
    complete = all(pair["state"] == "complete" for pair in pairs)
    on_target = question["gpu"] == context.target_card
    return {
        "schema": 1,
        "recipe": question["recipe"],
        "random_weights": question["random_weights"],
        "verdict": _verdict({finding["kind"] for finding in findings}, complete=complete),
        "statement": _statement(question, context, on_target=on_target),
        "card": question["gpu"],
        "target": {"id": context.target, "card": context.target_card},
        "on_target": on_target,
        "engine": question["engine"],
        "weights": question["weights"],
        "seed": question["seed"],
        "workloads": workloads,
        "contenders": _contenders(events),
        "throughput": throughput,
        "pairs": pairs,
        "ceilings": ceilings,
        "commands": commands,
        "not_raced": dict(context.not_raced),
        "findings": findings,
        "next_command": None if complete else context.next_command or None,
    }


def asked_rounds(events: Sequence[Event]) -> dict[str, int]:
    """Peer -> rounds that were asked last, in the order in which the peers were first asked."""
    asked: dict[str, int] = {}
    for event in events:
        if event["kind"] == "command":
            asked |= event["asked"]
    return asked


def _verdict(kinds: set[str], *, complete: bool) -> str:
    for kind in ("inconclusive", "anomalous"):
        if kind in kinds:
            return kind
    return "measured" if complete else "incomplete"


def _statement(question: Mapping[str, Any], context: Context, *, on_target: bool) -> str:
    """Where it was measured, and for what that says nothing."""
    where = f"measured on {question['gpu'].replace('-', ' ')}"
    weights = "; random weights of the recipe's shape" if question["random_weights"] else ""
    if on_target:
        return where + weights
    return f"{where}; says nothing about {context.target}{weights}"


def _pair(
    events: Sequence[Event], peer: str, rounds: int, workloads: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    rows, least = [], rounds
    for load in workloads:
        found = paired_rounds(events, peer, load["name"])
        least = min(least, len(found))
        if found:
            ours = [one.ours["output_tokens_per_s"] for one in found]
            theirs = [one.peer["output_tokens_per_s"] for one in found]
            rows.append(
                {
                    "workload": load["name"],
                    "ratio": paired_ratio(ours, theirs).to_json(),
                    "ours": [round(rate, 3) for rate in ours],
                    "peer": [round(rate, 3) for rate in theirs],
                }
            )
    failures = [one for one in events if one["kind"] == "failure" and one["peer"] == peer]
    failure = failures[-1] if failures and least < rounds else None
    state = "missing"
    if least >= rounds:
        state = "complete"
    elif failure:
        state = "failed"
    elif rows:
        state = "partial"
    return {
        "peer": peer,
        "state": state,
        "rounds": rounds,
        "failure": failure and {key: failure[key] for key in ("contender", "message")},
        "workloads": rows,
    }


def _throughput(
    events: Sequence[Event], workloads: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Median of every contender at every workload, over all its runs in complete rounds."""
    asked = asked_rounds(events)
    rounds = {
        (peer, load["name"]): paired_rounds(events, peer, load["name"])
        for peer in asked
        for load in workloads
    }
    for contender in (OURS, *asked):
        for load in workloads:
            runs = [
                one.ours if contender == OURS else one.peer
                for (peer, workload), found in rounds.items()
                if workload == load["name"] and contender in (OURS, peer)
                for one in found
            ]
            if runs:
                yield {
                    "contender": contender,
                    "workload": load["name"],
                    "batch": load["batch"],
                    "output_tokens_per_s": round(_median(runs, "output_tokens_per_s") or 0.0, 3),
                    "runs": len(runs),
                    "ttft_ms": _median(runs, "ttft_ms"),
                    "itl_ms": _median(runs, "itl_ms"),
                    "joules_per_token": _joules_per_token(runs),
                }


def _median(runs: Sequence[Event], name: str) -> float | None:
    values = [run[name] for run in runs if run.get(name) is not None]
    return float(statistics.median(values)) if len(values) == len(runs) else None


def _joules_per_token(runs: Sequence[Event]) -> float | None:
    """Energy and tokens are added up first: the card's counter is coarse for a short run."""
    if not all("energy_j" in run for run in runs):
        return None
    tokens = int(sum(run["output_tokens"] for run in runs))
    joules = float(sum(run["energy_j"] for run in runs))
    return round(joules / tokens, 6)


def _contenders(events: Sequence[Event]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for event in events:
        if event["kind"] == "command":
            found |= event["contenders"]
    return found


def _commands(events: Sequence[Event]) -> Iterator[dict[str, Any]]:
    """Each command with what followed it; one without an end was killed."""
    for event in events:
        if event["kind"] != "command":
            continue
        number = event["command"]
        own = [one for one in events if one["command"] == number]
        end = next((one for one in own if one["kind"] == "end"), None)
        findings = [] if end is None else list(end["findings"])
        if end is None and any(one["kind"] == "sample" for one in own):
            message = (
                f"command {number} was stopped from outside; the state of the card after it is "
                "not known"
            )
            findings.append(Finding(kind="note", message=message).to_json())
        yield {
            "command": number,
            "at": event["at"],
            "asked": event["asked"],
            "tools": event["tools"],
            "before": event["before"],
            "after": None if end is None else end["after"],
            "loads_s": {one["contender"]: one["seconds"] for one in own if one["kind"] == "load"},
            "samples": sum(one["kind"] == "sample" for one in own),
            "findings": findings,
        }


def _ceiling(load: Mapping[str, Any], line: Roofline) -> dict[str, Any]:
    rate = MeasuredRate(
        name=load["name"],
        batch=load["batch"],
        isl=load["isl"],
        osl=load["osl"],
        output_tokens_per_s=0.0,
    )
    ceiling, bound = run_ceiling(rate, line, bandwidth_bytes_per_s=line.bandwidth_bytes_per_s)
    return {
        "workload": load["name"],
        "batch": load["batch"],
        "output_tokens_per_s": round(ceiling, 1),
        "bound": bound,
    }
