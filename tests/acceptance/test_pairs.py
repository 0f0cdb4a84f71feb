"""An engine and its peers take turns; ratios are within rounds, their interval is a bootstrap."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import ToolError
from pipeline.core.values import Engine, Limits
from pipeline.race import (
    DRAWS,
    Peer,
    cache_bytes,
    measure_pairs,
    median_interval,
    ratio_of,
    shared_arguments,
)
from pipeline.runners.runner import Generation
from pipeline.runners.workload import BatchOptions, Workload
from tests.acceptance.questions import Stub
from tests.specs import tiny_spec

FOUR: dict[str, int] = {"rounds": 4, "vocab_size": 9, "seed": 0}
LOADS = (Workload(name="b1", batch=1, isl=4, osl=4), Workload(name="b2", batch=2, isl=4, osl=4))


@dataclass
class Clocked(Stub):
    """A session whose runs take `seconds`, longer from one to the next by what drifts."""

    name: str
    seconds: float
    turns: list[str]
    drift: list[float] = field(default_factory=lambda: [1.0])

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, options: BatchOptions | None = None
    ) -> Generation:
        self.turns.append(self.name)
        self.drift[0] *= 1.1
        tokens = np.zeros((len(prompts), osl), np.int64)
        return Generation(tokens=tokens, ttft_s=0.0, total_s=self.seconds * self.drift[0])


def peer_of(session: Clocked, opened: list[str], **more: Any) -> Peer:
    @contextlib.contextmanager
    def opening() -> Iterator[Clocked]:
        opened.append(session.name)
        yield session
        opened.append(f"{session.name} closed")

    return Peer(name=session.name, label=session.name.upper(), open=opening, **more)


def test_pairs_take_turns_and_one_peer_is_loaded_at_a_time() -> None:
    turns: list[str] = []
    drift = [1.0]
    engine = Clocked("engine", 1.0, turns, drift)
    slow, same = Clocked("slow", 3.0, turns, drift), Clocked("same", 1.0, turns, drift)
    peers = (peer_of(slow, turns, max_rounds=2), peer_of(same, turns))
    entries, not_run = measure_pairs(engine, peers, LOADS, **FOUR)
    assert not_run == ()
    abba = ["engine", "slow", "slow", "engine", "engine", "slow"]  # a warm-up and two rounds
    assert turns[:13] == ["slow", *abba, *abba]
    assert turns[13:15] == ["slow closed", "same"]
    assert [entry["workload"] for entry in entries] == ["b1", "b2"]
    for entry in entries:
        assert list(entry["peers"]) == ["slow", "same"]
        assert len(entry["samples"]) == 6  # of both pairs
        assert entry["peers"]["slow"]["label"] == "SLOW"
        assert entry["peers"]["slow"]["ratio"]["rounds"] == 2
        # Every run is a tenth slower than the one before it, and the ratio stays.
        assert entry["peers"]["slow"]["ratio"]["median"] == pytest.approx(3.0, rel=0.02)
        assert entry["peers"]["same"]["ratio"]["median"] == pytest.approx(1.0, rel=0.02)
        assert entry["spread"] > 1.0


def test_peer_that_fails_ends_its_pair_only(tmp_path: Path) -> None:
    @contextlib.contextmanager
    def broken() -> Iterator[Clocked]:
        raise ToolError(stage="x", command=["vllm"], returncode=1, log_path=tmp_path)
        yield

    turns: list[str] = []
    peers = (
        Peer(name="vllm-fp8", label="vLLM, its online FP8", open=broken),
        peer_of(Clocked("same", 1.0, turns), turns),
    )
    entries, not_run = measure_pairs(
        Clocked("engine", 1.0, turns), peers, LOADS, rounds=4, vocab_size=9, seed=0
    )
    assert [list(entry["peers"]) for entry in entries] == [["same"]] * 2
    assert [line.splitlines()[0] for line in not_run] == [
        f"vLLM, its online FP8: x: vllm exited 1; its log is {tmp_path}"
    ]
    entries, not_run = measure_pairs(
        Clocked("engine", 1.0, turns), peers[:1], LOADS, rounds=4, vocab_size=9, seed=0
    )
    assert entries == ()
    assert len(not_run) == 1


def test_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    found = ratio_of([10.0, 30.0, 50.0], [10.0, 10.0, 10.0])
    assert found == {"median": 3.0, "low": 1.0, "high": 5.0, "level": 0.95, "rounds": 3}
    few = ratio_of([2.0, 4.0], [1.0, 1.0])
    assert (few["median"], few["low"], few["high"]) == (3.0, None, None)
    with pytest.raises(ValueError, match="zip"):
        ratio_of([1.0, 2.0], [1.0])


def test_interval_holds_the_median_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        low, high = median_interval(rng.normal(2.0, 0.1, 15).tolist())
        held += low <= 2.0 <= high
    assert 0.90 * 200 <= held <= 200
    assert median_interval([1.0, 2.0, 3.0, 4.0]) == median_interval([1.0, 2.0, 3.0, 4.0])
    assert DRAWS >= 10_000


def engine_with(*serve_args: str, max_seq_len: int = 64) -> Engine:
    return Engine(
        dir=Path("/engine"), digest="0" * 64, format="checkpoint", variant="any",
        runtime=("vllm", "0.24.0"), sms=(), min_vram_bytes=0, serve_args=serve_args,
        limits=Limits(
            max_batch_size=4, max_seq_len=max_seq_len, max_num_tokens=64, kv_cache_dtype="fp8"
        ),
    )  # fmt: skip


def test_peers_get_the_artifacts_limits_and_not_its_cache_dtype() -> None:
    given = ("--max-model-len", "64", "--kv-cache-dtype", "fp8", "--max-num-seqs", "4")
    assert shared_arguments(given) == ("--max-model-len", "64", "--max-num-seqs", "4")
    assert shared_arguments(given[:2]) == given[:2]


def test_cache_holds_the_largest_workload_in_whole_blocks() -> None:
    spec = tiny_spec()
    load = replace(LOADS[0], batch=4, isl=20, osl=13)  # 33 tokens: three blocks of 16 each
    blocks = int(1.1 * 4 * 3) + 1
    assert cache_bytes(spec, [load], engine_with(), 2) == spec.kv_bytes(blocks * 16, 2)
    assert cache_bytes(spec, [load], engine_with(), 1) == spec.kv_bytes(blocks * 16, 1)
    wide = engine_with(max_seq_len=16 * 100)
    assert cache_bytes(spec, [load], wide, 1) == spec.kv_bytes((110 + 1) * 16, 1)
