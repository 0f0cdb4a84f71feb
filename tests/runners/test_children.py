"""One contract for every runner that holds its model in a child process, real package or stand-in.

`fake_packages` of vLLM and TensorRT-LLM have arithmetic for a model, the TensorRT-RTX one executes
the graph with ONNX Runtime, Transformers is the real one on a tiny checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import RecipeError
from pipeline.runners.child import ChildSession, open_child, session_program
from pipeline.runners.onnxruntime import OnnxRuntimeGraph, graph_session
from pipeline.runners.runner import Session
from pipeline.runners.tensorrt_rtx import TrtRtxRunner
from pipeline.runners.transformers import open_checkpoint
from pipeline.runners.workload import BatchOptions
from tests.formats.decoder.decoders import write_graph
from tests.quant.tiny_quantized import tiny_checkpoint
from tests.runners.toy_model import continued
from tests.runners.trtllm.engines import RUNNER as TRTLLM
from tests.runners.trtllm.engines import built_engine, runner_machine
from tests.runners.trtrtx.engines import CONTEXT, write_plan
from tests.runners.trtrtx.engines import PACKAGES as RTX_PACKAGES
from tests.runners.vllm.test_vllm_runner import PACKAGES as VLLM_PACKAGES
from tests.runners.vllm.test_vllm_runner import RUNNER as VLLM

TIMES: dict[str, Any] = {"load_s": 60.0, "answer_s": 60.0}
PROMPTS = [[5, 6, 7], [9, 8, 1]]
VOCAB = 320


class Arithmetic:
    """What the stand-ins of vLLM and TensorRT-LLM compute."""

    def stream(self, prompt: list[int], count: int, _eos: frozenset[int]) -> Iterator[int]:
        yield from continued(prompt, count, VOCAB)


@dataclass(frozen=True)
class Case:
    """A runner's child, what its model answers, and whether its requests may differ in length."""

    name: str
    open: Callable[[], AbstractContextManager[ChildSession]]
    reference: Session | Arithmetic
    context: int
    options: bool = True

    def answer(self, prompt: list[int], count: int) -> list[int]:
        return list(self.reference.stream(prompt, count, frozenset()))


def _vllm(patch: pytest.MonkeyPatch) -> Case:
    patch.setenv("PYTHONPATH", str(VLLM_PACKAGES))
    patch.setenv("FAKE_VLLM", "")
    serve = ("--max-model-len", "128", "--max-num-seqs", "4", "--kv-cache-dtype", "fp8")
    return Case("vLLM", lambda: VLLM.open_folder(Path("/model"), serve), Arithmetic(), 128)


def _trtllm(folder: Path, patch: pytest.MonkeyPatch) -> Case:
    runner_machine(folder / "machine", patch)
    engine = built_engine(tiny_checkpoint(folder / "checkpoint"), folder)
    opened = partial(TRTLLM.open, engine)
    return Case("TensorRT-LLM", opened, Arithmetic(), 128, options=False)


def _rtx(model_dir: Path, folder: Path, patch: pytest.MonkeyPatch, own: Session) -> Case:
    patch.setenv("ENGINESMITH_CACHE", str(folder / "cache"))
    root = Path(__file__).parents[2]
    patch.setenv("PYTHONPATH", os.pathsep.join([str(RTX_PACKAGES), str(root)]))
    graph = write_graph(model_dir, folder / "graph", context=CONTEXT)
    plan = write_plan(graph, folder / "engine")
    runner = TrtRtxRunner(load_timeout_s=60.0, answer_timeout_s=60.0)
    program = runner.program(plan.parent, "d" * 64, "tests.runners.trtrtx.engines:open_on_host")
    return Case("TensorRT-RTX", lambda: open_child(program), own, CONTEXT)


@pytest.fixture(scope="module", params=["vllm", "trtllm", "transformers", "tensorrt_rtx"])
def case(
    request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if request.param == "vllm":
            yield _vllm(patch)
        elif request.param == "trtllm":
            yield _trtllm(folder, patch)
        elif request.param == "transformers":
            checkpoint = tiny_checkpoint(folder / "checkpoint").dir
            own = stack.enter_context(open_checkpoint(checkpoint, 128))
            what: dict[str, Any] = {"checkpoint_dir": str(checkpoint), "context": 128}
            opener = f"{open_checkpoint.__module__}:open_checkpoint"
            program = session_program("Transformers", opener, **TIMES, **what)
            yield Case("Transformers", lambda: open_child(program), own, 128)
        else:
            file = write_graph(model_dir, folder / "reference", context=CONTEXT)
            yield _rtx(model_dir, folder, patch, graph_session(OnnxRuntimeGraph(file)))


@pytest.fixture(scope="module")
def session(case: Case) -> Iterator[ChildSession]:
    with case.open() as opened:
        yield opened


def test_logits_of_a_position_are_those_after_its_prefix(case: Case, session: ChildSession) -> None:
    tokens = [5, 3, 200, 7, 7]
    logits = session.logits(tokens)
    assert logits.shape == (5, VOCAB)
    assert logits.dtype == np.float32
    assert logits.argmax(axis=-1).tolist() == [
        case.answer(tokens[: end + 1], 1)[0] for end in range(5)
    ]


def test_a_batch_gives_exactly_osl_tokens_of_each_request(
    case: Case, session: ChildSession
) -> None:
    for prompts, osl in ((PROMPTS, 6), (PROMPTS[:1], 3), (PROMPTS, 1)):
        made = session.generate(prompts, osl)
        assert made.tokens.tolist() == [case.answer(prompt, osl) for prompt in prompts]
        assert made.lengths is None
        assert made.total_s > 0 < made.ttft_s


def test_each_request_ends_at_its_own_length_or_at_an_end_of_sequence_id(
    case: Case, session: ChildSession
) -> None:
    full = [case.answer(prompt, 8) for prompt in PROMPTS]
    each = BatchOptions(osl_each=(3, 8))
    ends = BatchOptions(osl_each=(8, 8), eos_token_ids=frozenset({full[0][2], full[1][5]}))
    if not case.options:
        with pytest.raises(RecipeError, match="batches of equal requests only"):
            session.generate(PROMPTS, 8, each)
        return
    assert session.generate(PROMPTS, 8, each).output_lengths == (3, 8)
    made = session.generate(PROMPTS, 8, ends)
    wanted = [
        next((at + 1 for at, token in enumerate(row) if token in ends.eos_token_ids), 8)
        for row in full
    ]
    assert made.output_lengths == tuple(wanted)
    assert made.tokens.shape == (2, max(wanted))  # nothing is computed after the last has ended
    for row, answer, length in zip(made.tokens.tolist(), full, wanted, strict=True):
        assert row[:length] == answer[:length]
        assert set(row[length:]) <= {-1}
    if case.name != "vLLM":
        with pytest.raises(RecipeError, match="use runner=vllm"):
            session.generate(PROMPTS, 8, BatchOptions(osl_each=(2, 2), arrivals_s=(0.1, 0.1)))


def test_stream_ends_before_an_end_of_sequence_token(case: Case, session: ChildSession) -> None:
    wanted = case.answer(PROMPTS[0], 8)
    assert list(session.stream(PROMPTS[0], 8, frozenset())) == wanted
    before = list(itertools.takewhile(lambda token: token != wanted[4], wanted))
    assert list(session.stream(PROMPTS[0], 8, frozenset({wanted[4]}))) == before


def test_stream_that_is_left_early_does_not_disturb_what_follows(
    case: Case, session: ChildSession
) -> None:
    stream = session.stream(PROMPTS[0], 40, frozenset())
    assert next(stream) == case.answer(PROMPTS[0], 1)[0]
    stream.close()  # type: ignore[attr-defined]  # a generator
    assert session.generate([[2]], 2).tokens.tolist() == [case.answer([2], 2)]


def test_answer_ends_where_the_context_is_full(case: Case, session: ChildSession) -> None:
    if case.name != "vLLM":  # its stand-in has no context
        assert 3 <= len(list(session.stream([5] * (case.context - 3), 40, frozenset()))) <= 4


def test_prompt_that_leaves_no_room_is_refused_with_both_numbers(
    case: Case, session: ChildSession
) -> None:
    size = case.context
    with pytest.raises(RecipeError, match=f"holds {size} tokens of a request") as caught:
        list(session.stream([1] * size, 4, frozenset()))
    assert f"a prompt of {size} tokens leaves no room for an answer" in str(caught.value)
    with pytest.raises(RecipeError, match=f"5 output tokens.* to {size - 5} tokens"):
        session.generate([[1] * size, [2]], 5)
