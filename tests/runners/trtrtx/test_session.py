"""Tokens and logits from an engine that another process holds, as they come to a caller."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import (
    CorruptError,
    IncompatibleError,
    PipelineError,
    RecipeError,
    ToolError,
)
from pipeline.runners.onnxruntime import OnnxRuntimeGraph, OnnxRuntimeSession
from pipeline.runners.session import Demands
from pipeline.runners.trtrtx.runner import TrtRtxRunner
from pipeline.runners.trtrtx.session import RtxSession, open_session
from pipeline.runners.vllm.process import Program
from pipeline.runners.vllm.session import Timeouts
from tests.formats.decoder.decoders import random_prompt, write_graph
from tests.runners.trtrtx.engines import CHILD, CONTEXT, MAX_BATCH, PACKAGES, write_plan

ROOT = Path(__file__).parents[3]
RUNNER = TrtRtxRunner(
    kernel_specialization="eager",
    runtime_cache=True,
    load_timeout_s=60.0,
    answer_timeout_s=60.0,
)
RAGGED = [random_prompt(length, seed=length) for length in (10, 1, 27, 3, 16)]
PROMPT = RAGGED[0]


@pytest.fixture(scope="module")
def graph_file(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_graph(model_dir, tmp_path_factory.mktemp("graph"), context=CONTEXT)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own temporary folder and cache, and the stand-in for the package; returns the first."""
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


PROGRAM = Program(
    name="TensorRT-RTX",
    command=(sys.executable, str(CHILD)),
    env={"PYTHONPATH": os.pathsep.join([str(PACKAGES), str(ROOT)])},
)


def arguments(plan: Path) -> list[str]:
    return RUNNER.child_arguments(plan.parent, "d" * 64)


def opened(plan: Path, answer_s: float = 60.0) -> AbstractContextManager[RtxSession]:
    return open_session(arguments(plan), Timeouts(load_s=60.0, answer_s=answer_s), PROGRAM)


@pytest.fixture
def plan(graph_file: Path, tmp_path: Path, machine: Path) -> Path:
    return write_plan(graph_file, tmp_path / "engine")


@pytest.fixture
def session(plan: Path) -> Iterator[RtxSession]:
    with opened(plan) as session:
        yield session


def test_a_session_answers_as_the_twin_and_leaves_only_its_kernels(
    plan: Path, machine: Path, graph: OnnxRuntimeGraph
) -> None:
    twin = OnnxRuntimeSession(graph)
    with opened(plan) as session:
        np.testing.assert_allclose(session.logits(PROMPT), twin.logits(PROMPT), rtol=0, atol=1e-4)
        for prompts in (RAGGED, [PROMPT], RAGGED[:3]):
            made = session.generate(prompts, 8)
            np.testing.assert_array_equal(made.tokens, twin.generate(prompts, 8).tokens)
            assert 0 < made.ttft_s < made.total_s
        wanted = list(twin.stream(PROMPT, 12, frozenset()))
        assert list(session.stream(PROMPT, 12, frozenset())) == wanted
        stop = wanted[5]
        assert list(session.stream(PROMPT, 12, frozenset({stop}))) == wanted[: wanted.index(stop)]
        left = session.stream(PROMPT, 12, frozenset())
        assert next(left) == wanted[0]
        left.close()  # type: ignore[attr-defined]
        assert session.generate([PROMPT], 3).tokens[0].tolist() == wanted[:3]
    assert list(machine.iterdir()) == []
    (kernels,) = (machine.parent / "cache" / "rtx-kernels").iterdir()
    assert b"(5, 1)" in kernels.read_bytes()


def test_each_row_ends_at_its_own_length_or_at_an_end_of_sequence_id(
    session: RtxSession, graph: OnnxRuntimeGraph
) -> None:
    twin = OnnxRuntimeSession(graph)
    stop = int(twin.generate(RAGGED, 8).tokens[0, 2])
    for demands in (
        Demands(osl_each=(3, 1, 5, 2, 4)),
        Demands(osl_each=(8,) * len(RAGGED), eos_token_ids=frozenset({stop})),
    ):
        made, wanted = (one.generate(RAGGED, 8, demands) for one in (session, twin))
        assert made.lengths == wanted.lengths
        assert min(made.output_lengths) < max(made.output_lengths)
        np.testing.assert_array_equal(made.tokens, wanted.tokens)
    arriving = Demands(osl_each=(2,) * len(RAGGED), arrivals_s=(0.1,) * len(RAGGED))
    with pytest.raises(RecipeError, match="use runner=vllm"):
        session.generate(RAGGED, 2, arriving)


def test_a_stream_that_is_left_early_is_ended_there(
    plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_RTX", "slow")
    with opened(plan) as session:
        received: list[dict[str, Any]] = []
        receive = session._receive

        def recorded() -> dict[str, Any]:
            received.append(receive())
            return received[-1]

        monkeypatch.setattr(session, "_receive", recorded)
        stream = session.stream(PROMPT, CONTEXT, frozenset())
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert received[-1] == {"kind": "result"}
    assert len(received) < 20  # of the 38 that were left


def test_a_fault_in_a_request_keeps_its_class_and_the_session_goes_on(session: RtxSession) -> None:
    with pytest.raises(RecipeError, match="wanted 1 of 1 to 48 tokens each"):
        session.generate([[5] * (CONTEXT + 1)], 1)
    with pytest.raises(RecipeError, match=f"got 6 prompts; wanted 1 to {MAX_BATCH}"):
        session.generate([[5]] * 6, 1)
    with pytest.raises(PipelineError, match=r"asked the engine for 1 x 20 tokens, got \(1, 9\)"):
        session.generate([[5] * 40], 20)
    assert session.generate([[5] * 40], 9).tokens.shape == (1, 9)


@pytest.mark.parametrize("ask", ["logits", "generate", "stream"])
def test_a_logit_that_is_no_number_is_never_an_answer(
    plan: Path, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    monkeypatch.setenv("FAKE_RTX", "nan")
    questions: dict[str, Callable[[RtxSession], Any]] = {
        "logits": lambda session: session.logits(PROMPT),
        "generate": lambda session: session.generate([PROMPT, PROMPT], 4),
        # argmax finds the NaN, at 7: the stream would end as if the model had ended it.
        "stream": lambda session: list(session.stream(PROMPT, 4, frozenset({7}))),
    }
    with pytest.raises(CorruptError, match="not finite"), opened(plan) as session:
        questions[ask](session)


@pytest.mark.parametrize(
    ("plan_fault", "error", "shown"),
    [
        ({"sm": 120}, IncompatibleError, "cannot load .*runner=trtrtx"),
        ({"faults": {"without": "write_indices"}}, CorruptError, "lacks .'write_indices'"),
    ],
)
def test_an_engine_that_does_not_load_is_told_in_its_class_and_keeps_its_log(
    graph_file: Path,
    tmp_path: Path,
    machine: Path,
    plan_fault: dict[str, object],
    error: type[PipelineError],
    shown: str,
) -> None:
    plan = write_plan(graph_file, tmp_path / "engine", **plan_fault)  # type: ignore[arg-type]
    with pytest.raises(error, match=shown) as told, opened(plan):
        pass
    (log,) = machine.iterdir()
    assert str(log) in str(told.value)
    assert "host_child.py" in log.read_text()


@pytest.mark.parametrize(
    ("fault", "answer_s", "shown"), [("die", 60.0, "exited 9"), ("hang", 1.0, "answer_timeout_s")]
)
def test_a_process_that_dies_or_hangs_ends_the_wait(
    plan: Path, monkeypatch: pytest.MonkeyPatch, fault: str, answer_s: float, shown: str
) -> None:
    monkeypatch.setenv("FAKE_RTX", fault)
    with pytest.raises(ToolError, match=shown), opened(plan, answer_s) as session:
        session.generate([PROMPT], 2)
    assert session._child._process.poll() is not None


def test_a_killed_caller_leaves_no_process(plan: Path) -> None:
    process = subprocess.Popen(
        [*PROGRAM.command, *arguments(plan)],
        env={**os.environ, **PROGRAM.env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert json.loads(process.stdout.readline()) == {"kind": "ready"}
        process.stdin.close()
        assert process.wait(20) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_program_that_is_shipped_tells_why_it_cannot_load(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a card, and from another folder."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    opened = RUNNER.open_folder(plan.parent, "d" * 64)
    with pytest.raises(IncompatibleError, match="sees no CUDA device"), opened:
        pass
