"""Two loaded models take turns, round by round: ours and a peer, then the peer and ours.

Ours stays loaded from the first pair to the last; each peer is loaded beside it in its turn. Loads
never overlap, neither with each other nor with a round: while it loads, vLLM picks kernels by
timing them (Inductor's `benchmark_combo_kernel`, FlashInfer's autotuning: config/compilation.py
and config/kernel.py of vLLM 0.24.0), and what runs beside it would change its choice for good.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.acceptance.race.contenders import Contender, fit_fault
from pipeline.acceptance.race.journal import Journal
from pipeline.acceptance.sampler import device_samples
from pipeline.acceptance.speed_sample import DeviceUse, SpeedSample
from pipeline.core.errors import PipelineError
from pipeline.runners.session import Session
from pipeline.runners.workload import Workload

log = logging.getLogger(__name__)

LOAD_S = 60.0
"""Expected time of a load before any was seen: vLLM with Phi-3-mini's shape took 50 to 57 s on an
H200 (2026-11-24)."""
CLOSE_S = 20.0
"""Kept free at the end for ending processes and writing the report."""


@dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """What is run.

    Attributes:
        workloads: The loads.
        rounds: Timed rounds of each pair at each workload.
        seed: Of synthetic prompts.
        vocab_size: Token ids are below it.
    """

    workloads: tuple[Workload, ...]
    rounds: int
    seed: int
    vocab_size: int

    def rounds_with(self, peer: Contender) -> int:
        """Rounds of the pair with `peer`."""
        return min(self.rounds, peer.pace.max_rounds or self.rounds)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """The time that the command may take.

    Attributes:
        limit_s: From `started`; None for no limit.
        started: Seconds of `now`.
        now: A monotonic clock.
    """

    limit_s: float | None
    started: float
    now: Callable[[], float] = time.monotonic

    def allows(self, seconds: float) -> bool:
        """Whether so many seconds are left, beside those for closing."""
        if self.limit_s is None:
            return True
        return self.now() - self.started + seconds + CLOSE_S <= self.limit_s


class ContenderError(PipelineError):
    """A contender failed; its pair ends, the race goes on."""

    def __init__(self, contender: str, error: PipelineError) -> None:
        self.contender = contender
        super().__init__(str(error))


class OutOfTimeError(Exception):
    """The time limit does not hold what comes next; not a failure."""


class Lane:
    """A contender that is opened when it is first needed, and opened anew after it failed."""

    def __init__(self, contender: Contender, journal: Journal) -> None:
        self.contender = contender
        self._journal = journal
        self._stack = contextlib.ExitStack()
        self._session: Session | None = None
        self.load_s = LOAD_S

    @property
    def loaded(self) -> bool:
        return self._session is not None

    def session(self) -> Session:
        """The session, loaded now if it is not yet.

        Raises:
            ContenderError: It does not load.
        """
        if self._session is None:
            name = self.contender.name
            logs = self._journal.folder / "logs"
            logs.mkdir(exist_ok=True)
            log.info("%s: loading %s", name, self.contender.label)
            started = time.monotonic()
            path = logs / f"{name}-{self._journal.command}.log"
            try:
                self._session = self._stack.enter_context(self.contender.open(path))
            except PipelineError as error:
                raise ContenderError(name, error) from error
            self.load_s = time.monotonic() - started
            self._journal.add("load", contender=name, seconds=round(self.load_s, 2))
            log.info("%s: loaded in %.1f s", name, self.load_s)
        return self._session

    def close(self, error: BaseException | None = None) -> None:
        """Free it; `error` tells it that it need not be asked to end."""
        self._session = None
        kind = None if error is None else type(error)
        with contextlib.suppress(PipelineError):  # it failed before, which has been told
            self._stack.__exit__(kind, error, None)
        self._stack = contextlib.ExitStack()


def run_race(
    ours: Contender,
    peers: Sequence[Contender],
    settings: RaceSettings,
    journal: Journal,
    *,
    clock: Clock,
    free_bytes: int | None,
) -> bool:
    """Run what is missing of every pair; failures and samples go into the journal.

    Args:
        ours: The contender that all others are compared with.
        peers: Those, in the order in which they are raced.
        settings: What is run.
        journal: Gets every sample.
        clock: When to stop.
        free_bytes: Device memory that both may take; None without a device.

    Returns:
        False if the time ran out before all was done.
    """
    lane = Lane(ours, journal)
    error: BaseException | None = None
    try:
        for peer in peers:
            if not _missing(peer, settings, journal):
                log.info("%s: complete already", peer.name)
                continue
            if fault := fit_fault(ours, peer, free_bytes):
                _failed(journal, peer, peer.name, fault)
                continue
            try:
                _race_pair(lane, Lane(peer, journal), settings, journal, clock)
            except ContenderError as failure:
                _failed(journal, peer, failure.contender, str(failure))
                if failure.contender == ours.name:
                    lane.close(failure)
        return True
    except OutOfTimeError as stop:
        log.info("Stopped by the time limit before %s", stop)
        return False
    except BaseException as other:
        error = other
        raise
    finally:
        lane.close(error)


def _failed(journal: Journal, peer: Contender, contender: str, message: str) -> None:
    log.warning("%s against ours: %s failed: %s", peer.name, contender, message)
    journal.add("failure", peer=peer.name, contender=contender, message=message)


def _missing(
    peer: Contender, settings: RaceSettings, journal: Journal
) -> dict[str, tuple[int, ...]]:
    """Workload -> rounds that are not done; complete workloads are left out."""
    rounds = settings.rounds_with(peer)
    found = {
        load.name: journal.missing(peer.name, load.name, rounds) for load in settings.workloads
    }
    return {name: numbers for name, numbers in found.items() if numbers}


def _race_pair(
    ours: Lane, peer: Lane, settings: RaceSettings, journal: Journal, clock: Clock
) -> None:
    """Load what is not loaded, warm both up, and run the missing rounds.

    Raises:
        ContenderError: One of the two failed.
        OutOfTimeError: The clock does not allow the next step.
    """
    missing = _missing(peer.contender, settings, journal)
    loads = [load for load in settings.workloads if load.name in missing]
    seconds = sum(lane.load_s for lane in (ours, peer) if not lane.loaded)
    if not clock.allows(seconds):
        raise OutOfTimeError(f"loading {peer.contender.name}, about {seconds:.0f} s")
    error: BaseException | None = None
    try:
        pair = (
            (ours.contender, ours.session()),
            (peer.contender, peer.session()),
        )
        prompts = {
            load.name: [
                list(row) for row in load.request_prompts(settings.vocab_size, settings.seed)
            ]
            for load in loads
        }
        took = _warm_up(pair, loads, prompts, peer.contender)
        for number in sorted({number for numbers in missing.values() for number in numbers}):
            for load in (load for load in loads if number in missing[load.name]):
                if not clock.allows(took[load.name]):
                    raise OutOfTimeError(
                        f"round {number + 1} of {peer.contender.name} at {load.name}, about "
                        f"{took[load.name]:.0f} s"
                    )
                started = time.monotonic()
                for sample in _round(pair, load, prompts[load.name], number):
                    journal.add(
                        "sample",
                        peer=peer.contender.name,
                        workload=load.name,
                        round=number,
                        **sample,
                    )
                took[load.name] = max(took[load.name], time.monotonic() - started)
            done, all_rounds = number + 1, settings.rounds_with(peer.contender)
            log.info("%s: round %d of %d", peer.contender.name, done, all_rounds)
    except BaseException as other:
        error = other
        raise
    finally:
        peer.close(error)


Pair = tuple[tuple[Contender, Session], tuple[Contender, Session]]


def _warm_up(
    pair: Pair, loads: Sequence[Workload], prompts: dict[str, list[list[int]]], peer: Contender
) -> dict[str, float]:
    """Run each once or more without counting; workload -> seconds that a round will take about."""
    took = {}
    for load in loads:
        seconds = 0.0
        for contender, session in pair:
            osl = load.osl
            if contender is peer and contender.pace.warm_up_osl is not None:
                osl = min(osl, contender.pace.warm_up_osl)
            for _ in range(load.warm_ups):
                run = _run(contender, session, prompts[load.name], osl)
            seconds += run["seconds"] * load.osl / osl
        took[load.name] = seconds
    return took


def _round(
    pair: Pair, load: Workload, prompts: list[list[int]], number: int
) -> Iterator[dict[str, Any]]:
    """Both contenders once; who begins changes from round to round, so that the order is ABBA."""
    order = pair if number % 2 == 0 else pair[::-1]
    for position, (contender, session) in enumerate(order):
        sample = _run(contender, session, prompts, load.osl)
        yield {"contender": contender.name, "position": position, **sample}


def _run(
    contender: Contender, session: Session, prompts: list[list[int]], osl: int
) -> dict[str, Any]:
    """One batch.

    Raises:
        ContenderError: It failed, or gave too few tokens.
    """
    started = datetime.now(UTC).isoformat(timespec="milliseconds")
    try:
        with device_samples() as readings:
            made = session.generate(prompts, osl)
        sample = SpeedSample.of(made, prompts=prompts, osl=osl, device=DeviceUse.of(readings))
    except PipelineError as error:
        raise ContenderError(contender.name, error) from error
    figures = {
        "at": started,
        "seconds": round(made.total_s, 6),
        "output_tokens": int(made.tokens.size),
        "output_tokens_per_s": sample.output_tokens_per_s,
        "ttft_ms": round(sample.ttft_ms, 3),
        "itl_ms": round(sample.itl_ms, 4),
    }
    if sample.device is not None and sample.device.energy_j is not None:
        figures["energy_j"] = round(sample.device.energy_j, 3)
    return figures
