"""Contenders that run on a CPU; run as a module with MODEL FOLDER ROUNDS, it races them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.acceptance.race.command import begin
from pipeline.acceptance.race.contenders import OURS, Contender, Pace
from pipeline.acceptance.race.journal import Journal, open_journal
from pipeline.acceptance.race.rounds import Clock, RaceSettings, run_race
from pipeline.acceptance.race.transformers_contender import TransformersContender
from pipeline.runners.onnxruntime import open_graph
from pipeline.runners.session import Session
from pipeline.runners.vllm.session import Timeouts
from pipeline.runners.workload import Workload
from tests.formats.decoder.decoders import write_graph
from tests.tiny import VOCAB_SIZE

PACE, SHORT_WARM_UP = Pace(), Pace(warm_up_osl=2)
TIMES = Timeouts(load_s=60.0, answer_s=30.0)
LOADS = (
    Workload(name="b1", batch=1, isl=8, osl=4),
    Workload(name="b2", batch=2, isl=8, osl=4),
)
QUESTION: dict[str, Any] = {
    "schema": 1,
    "recipe": "tiny",
    "random_weights": True,
    "gpu": "NVIDIA-H100-80GB-HBM3",
    "engine": {"digest": "e" * 64, "variant": "any-checkpoint-fp8-kv8", "limits": {}},
    "weights": {"digest": "d" * 64, "origin": "random:LlamaForCausalLM", "commit": None},
    "workloads": [{"name": load.name, **load.load} for load in LOADS],
    "seed": 7,
    "tools": {"python": "3"},
}


@dataclass(frozen=True, kw_only=True)
class CpuContender:
    """A graph on ONNX Runtime, or whatever `opened` opens."""

    opened: Callable[[], AbstractContextManager[Session]]
    name: str = OURS
    label: str = "graph on ONNX Runtime"
    arguments: tuple[str, ...] = ()
    memory_bytes: int = 0
    pace: Pace = PACE

    def open(self, log_path: Path) -> AbstractContextManager[Session]:
        return self.opened()


def graph_contender(graph: Path) -> CpuContender:
    return CpuContender(opened=lambda: open_graph(graph, threads=1))


def transformers_contender(model_dir: Path) -> TransformersContender:
    return TransformersContender(
        weights_dir=model_dir, memory_bytes=0, timeouts=TIMES, device="cpu"
    )


def settings(rounds: int) -> RaceSettings:
    return RaceSettings(workloads=LOADS, rounds=rounds, seed=7, vocab_size=VOCAB_SIZE)


def race(
    ours: Contender,
    peers: Sequence[Contender],
    folder: Path,
    *,
    rounds: int,
    resume: bool = False,
    clock: Clock | None = None,
    free_bytes: int | None = None,
) -> tuple[Journal, bool]:
    """One command of a race: its journal, and whether it came to its end in time."""
    journal = open_journal(folder, QUESTION, resume=resume)
    asked = settings(rounds)
    begin(journal, ours, peers, asked, None)
    clock = clock or Clock(limit_s=None, started=time.monotonic())
    timely = run_race(ours, peers, asked, journal, clock=clock, free_bytes=free_bytes)
    journal.add("end", after=None, findings=[], in_time=timely)
    return journal, timely


def main(model_dir: Path, folder: Path, rounds: int) -> None:
    """A race that somebody will kill."""
    peer = transformers_contender(model_dir)
    quick = CpuContender(
        opened=lambda: peer.open(folder / "peer.log"), name="transformers", pace=SHORT_WARM_UP
    )
    graph = write_graph(model_dir, folder.parent / "graph", context=48)
    race(graph_contender(graph), [quick], folder, rounds=rounds)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
