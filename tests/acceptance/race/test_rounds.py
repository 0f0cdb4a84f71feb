"""A whole race on a CPU: a graph on ONNX Runtime against Transformers in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.acceptance.race.contenders import OURS, Contender
from pipeline.acceptance.race.journal import JOURNAL
from pipeline.acceptance.race.rounds import CLOSE_S, Clock
from pipeline.core.errors import PipelineError
from pipeline.runners.session import Demands, Generation, Session
from tests.acceptance.race.cpu_race import (
    LOADS,
    CpuContender,
    graph_contender,
    race,
    transformers_contender,
)
from tests.formats.decoder.decoders import write_graph
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ours(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> CpuContender:
    return graph_contender(write_graph(model_dir, tmp_path_factory.mktemp("graph"), context=48))


class Wrapped:
    """A session that somebody looks at, or spoils."""

    def __init__(self, inner: Session, change: Callable[[Generation], Generation]) -> None:
        self._inner, self._change = inner, change

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, demands: Demands | None = None
    ) -> Generation:
        return self._change(self._inner.generate(prompts, osl, demands))

    def logits(self, tokens: Sequence[int]) -> Any:
        raise NotImplementedError

    def stream(self, prompt: Sequence[int], count: int, ends: frozenset[int]) -> Iterator[int]:
        raise NotImplementedError


def wrapped(
    contender: CpuContender, name: str, change: Callable[[Generation], Generation]
) -> CpuContender:
    @contextlib.contextmanager
    def opened() -> Iterator[Session]:
        with contender.opened() as inner:
            yield Wrapped(inner, change)

    return dataclasses.replace(contender, name=name, opened=opened)


def broken(name: str) -> CpuContender:
    @contextlib.contextmanager
    def opened() -> Iterator[Session]:
        raise PipelineError("it does not load: no kernel for this card")
        yield

    return CpuContender(opened=opened, name=name)


def kinds(folder: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (folder / JOURNAL).read_text().splitlines()]


def test_a_race_of_two_runtimes_takes_turns_in_abba_order(
    ours: CpuContender, model_dir: Path, tmp_path: Path
) -> None:
    peer = transformers_contender(model_dir)
    journal, timely = race(ours, [peer], tmp_path / "race", rounds=5)
    assert timely
    assert journal.events[0]["asked"] == {"transformers": 3}  # a slow one gets fewer rounds
    runs = [event for event in journal.events if event["kind"] == "sample"]
    assert [(run["round"], run["workload"], run["contender"]) for run in runs] == [
        (number, load.name, name)
        for number in range(3)
        for load in LOADS
        for name in ((OURS, "transformers") if number % 2 == 0 else ("transformers", OURS))
    ]
    assert all(run["output_tokens"] == (4 if run["workload"] == "b1" else 8) for run in runs)
    assert all(run["output_tokens_per_s"] > 0 and run["ttft_ms"] > 0 for run in runs)
    for run in runs:
        rate = run["output_tokens"] / run["seconds"]
        assert run["output_tokens_per_s"] == pytest.approx(rate, rel=1e-2)
    assert [event["contender"] for event in journal.events if event["kind"] == "load"] == [
        OURS,
        "transformers",
    ]
    assert (tmp_path / "race" / "logs" / "transformers-1.log").is_file()


def test_both_get_the_same_prompts_and_agree_on_the_tokens(
    ours: CpuContender, model_dir: Path, tmp_path: Path
) -> None:
    seen: dict[str, list[Any]] = {OURS: [], "peer": []}

    def note(name: str) -> Callable[[Generation], Generation]:
        def change(made: Generation) -> Generation:
            seen[name].append(made.tokens.tolist())
            return made

        return change

    hf = transformers_contender(model_dir)
    peer = CpuContender(opened=lambda: hf.open(tmp_path / "hf.log"))
    race(
        wrapped(ours, OURS, note(OURS)),
        [wrapped(peer, "peer", note("peer"))],
        tmp_path / "race",
        rounds=2,
    )
    assert len(seen["peer"]) == 6  # one warm-up and two rounds of each workload
    # The graph computes in float32 as Transformers does here: greedy tokens are the same.
    assert [sorted(map(str, seen[name])) for name in seen] == [sorted(map(str, seen["peer"]))] * 2


def test_a_contender_that_does_not_load_is_told_and_the_others_race(
    ours: CpuContender, tmp_path: Path
) -> None:
    other = dataclasses.replace(ours, name="other")
    journal, timely = race(ours, [broken("bad"), other], tmp_path / "race", rounds=2)
    assert timely
    (failure,) = [event for event in journal.events if event["kind"] == "failure"]
    assert (failure["peer"], failure["contender"]) == ("bad", "bad")
    assert "no kernel for this card" in failure["message"]
    assert len(journal.rounds("other", "b2")) == 2
    assert [event["contender"] for event in journal.events if event["kind"] == "load"] == [
        OURS,
        "other",
    ]


def test_too_few_tokens_are_a_failure_and_never_a_rate(ours: CpuContender, tmp_path: Path) -> None:
    def short(made: Generation) -> Generation:
        return dataclasses.replace(made, tokens=made.tokens[:, :-1])

    peers: list[Contender] = [wrapped(ours, "short", short)]
    journal, _ = race(ours, peers, tmp_path / "race", rounds=2)
    assert kinds(tmp_path / "race") == ["command", "load", "load", "failure", "end"]
    assert "asked the runner for 1 answers of 4 tokens" in journal.events[3]["message"]


def test_times_that_no_run_can_have_are_a_failure(ours: CpuContender, tmp_path: Path) -> None:
    def timeless(made: Generation) -> Generation:
        return dataclasses.replace(made, total_s=0.0, ttft_s=0.0)

    journal, _ = race(ours, [wrapped(ours, "timeless", timeless)], tmp_path / "race", rounds=1)
    assert [event["kind"] for event in journal.events][-2] == "failure"


def test_ours_is_loaded_anew_after_it_failed(ours: CpuContender, tmp_path: Path) -> None:
    runs = 0

    def sometimes(made: Generation) -> Generation:
        nonlocal runs
        runs += 1
        if runs == 4:
            raise PipelineError("out of memory")
        return made

    peers = [dataclasses.replace(ours, name=name) for name in ("first", "second")]
    journal, _ = race(wrapped(ours, OURS, sometimes), peers, tmp_path / "race", rounds=2)
    (failure,) = [event for event in journal.events if event["kind"] == "failure"]
    assert (failure["peer"], failure["contender"]) == ("first", OURS)
    assert len(journal.rounds("second", "b1")) == 2
    loads = [event["contender"] for event in journal.events if event["kind"] == "load"]
    assert loads == [OURS, "first", OURS, "second"]


def test_two_that_do_not_fit_together_are_told_before_either_is_loaded(
    ours: CpuContender, tmp_path: Path
) -> None:
    big = dataclasses.replace(ours, memory_bytes=50_000_000_000)
    peer = dataclasses.replace(big, name="peer")
    race(big, [peer], tmp_path / "race", rounds=1, free_bytes=99_000_000_000)
    assert kinds(tmp_path / "race") == ["command", "failure", "end"]
    journal, _ = race(big, [peer], tmp_path / "fits", rounds=1, free_bytes=100_000_000_000)
    assert len(journal.rounds("peer", "b1")) == 1
    assert "ours and peer need about 100.0 GB together" in (
        (tmp_path / "race" / JOURNAL).read_text()
    )


def test_the_time_limit_stops_between_rounds_and_the_next_command_does_the_rest(
    ours: CpuContender, tmp_path: Path
) -> None:
    peer = dataclasses.replace(ours, name="peer")
    folder = tmp_path / "race"
    ticks = iter([0.0, 1.0, 2.0, 3.0])  # load, two rounds, and then it is late
    clock = Clock(limit_s=CLOSE_S + 200.0, started=0.0, now=lambda: next(ticks, 1e6))
    journal, timely = race(ours, [peer], folder, rounds=3, clock=clock)
    assert not timely
    assert sum(event["kind"] == "sample" for event in journal.events) == 6
    assert len(journal.rounds("peer", "b1")) == 2
    assert len(journal.rounds("peer", "b2")) == 1
    before = (folder / JOURNAL).read_bytes()
    journal, timely = race(ours, [peer], folder, rounds=3, resume=True)
    assert timely
    assert (folder / JOURNAL).read_bytes().startswith(before)
    assert [len(journal.rounds("peer", load.name)) for load in LOADS] == [3, 3]
    assert sum(event["kind"] == "sample" for event in journal.events) == 12


def test_there_is_no_time_to_load_what_could_not_run(ours: CpuContender, tmp_path: Path) -> None:
    clock = Clock(limit_s=CLOSE_S + 100.0, started=0.0, now=lambda: 0.0)  # two loads are 120 s
    _, timely = race(ours, [dataclasses.replace(ours, name="peer")], tmp_path / "race", rounds=1,
                     clock=clock)  # fmt: skip
    assert not timely
    assert kinds(tmp_path / "race") == ["command", "end"]


def test_what_is_complete_is_not_loaded_again(ours: CpuContender, tmp_path: Path) -> None:
    peer = dataclasses.replace(ours, name="peer")
    race(ours, [peer], tmp_path / "race", rounds=1)
    race(broken(OURS), [peer], tmp_path / "race", rounds=1, resume=True)
    assert kinds(tmp_path / "race")[-2:] == ["command", "end"]


def test_a_killed_race_loses_one_round_at_most_and_leaves_no_process(
    ours: CpuContender, model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "work" / "race"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.acceptance.race.cpu_race",
            str(model_dir),
            str(folder),
            "100000",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    path = folder / JOURNAL
    deadline = time.monotonic() + 90
    while not path.is_file() or path.read_bytes().count(b'"sample"') < 9:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    samples = whole.count(b'"sample"')
    assert samples >= 9
    path.write_bytes(raw + b'{"kind": "sam')

    hf = transformers_contender(model_dir)
    peer = CpuContender(opened=lambda: hf.open(tmp_path / "hf.log"), name="transformers")
    rounds = samples // 4 + 2
    journal, _ = race(ours, [peer], folder, rounds=rounds, resume=True)
    assert path.read_bytes().startswith(whole)
    pairs = journal.rounds("transformers", "b1")
    assert [pair.round for pair in pairs] == list(range(rounds))
    kept = sum(pair.ours["command"] == 1 for load in LOADS
               for pair in journal.rounds("transformers", load.name))  # fmt: skip
    assert kept == samples // 2
    deadline = time.monotonic() + 10
    while str(model_dir) in _command_lines():
        assert time.monotonic() < deadline, "a child outlived its killed parent"
        time.sleep(0.1)


def _command_lines() -> str:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return "\n".join(found)


def test_a_hanging_contender_is_ended_and_named(model_dir: Path, tmp_path: Path) -> None:
    from pipeline.core.errors import ToolError
    from pipeline.runners.vllm.session import Timeouts

    hf = dataclasses.replace(
        transformers_contender(model_dir), timeouts=Timeouts(load_s=60.0, answer_s=0.01)
    )
    with (
        pytest.raises(ToolError, match=r"(?s)runner transformers.*raise runner\.answer_timeout_s"),
        hf.open(tmp_path / "log") as session,
    ):
        session.generate([[1, 2, 3]] * 256, 200)  # seconds, however late this process is woken


def test_a_model_that_cannot_be_read_is_an_error_with_the_end_of_the_log(tmp_path: Path) -> None:
    with (
        pytest.raises(PipelineError, match=r"config\.json"),
        transformers_contender(tmp_path / "nothing").open(tmp_path / "log"),
    ):
        pass
