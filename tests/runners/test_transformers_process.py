"""The simulation of a checkpoint in a process of its own: the same answers, and how it ends.

The device is the CPU: what differs on a card is where PyTorch computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.cache import StageCache
from pipeline.core.errors import IncompatibleError, PipelineError, ToolError
from pipeline.core.values import Checkpoint, Engine
from pipeline.formats.checkpoint.compiler import CheckpointCompiler
from pipeline.runners.session import CacheClearing, Demands, Runner
from pipeline.runners.transformers import TransformersRunner, TransformersSession, open_checkpoint
from pipeline.runners.transformers_process import TransformersProcessSession, open_process
from pipeline.runners.vllm.session import Timeouts
from tests.quant.tiny_quantized import ADA, tiny_checkpoint

TIMES = Timeouts(load_s=120.0, answer_s=60.0)
PROMPTS = [[5, 6, 7, 8], [9, 8, 7, 6]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def other(checkpoint: Checkpoint) -> Iterator[TransformersProcessSession]:
    with open_process(checkpoint.dir, 128, "cpu", TIMES) as session:
        yield session


@pytest.fixture(scope="module")
def own(checkpoint: Checkpoint) -> Iterator[TransformersSession]:
    with open_checkpoint(checkpoint.dir, 128) as session:
        yield session


def test_answers_are_those_of_the_simulation_in_this_process(
    own: TransformersSession, other: TransformersProcessSession
) -> None:
    np.testing.assert_allclose(other.logits(PROMPTS[0]), own.logits(PROMPTS[0]), atol=1e-5)
    wanted = own.generate(PROMPTS, 8)
    made = other.generate(PROMPTS, 8)
    assert made.tokens.tolist() == wanted.tokens.tolist()
    assert made.lengths is None
    assert 0 < made.ttft_s < made.total_s
    streamed = list(other.stream(PROMPTS[0], 8, frozenset()))
    assert streamed == wanted.tokens[0].tolist()
    demands = Demands(osl_each=(3, 6), eos_token_ids=frozenset({streamed[1]}))
    ended = other.generate(PROMPTS, 8, demands)
    assert ended.output_lengths == own.generate(PROMPTS, 8, demands).output_lengths
    assert ended.output_lengths[0] <= 2


def test_cache_is_cleared_there_and_changes_nothing(other: TransformersProcessSession) -> None:
    assert isinstance(other, CacheClearing)
    before = other.generate(PROMPTS, 4).tokens.tolist()
    other.clear_cache()
    assert other.generate(PROMPTS, 4).tokens.tolist() == before


def test_error_there_is_an_error_here_and_the_session_goes_on(
    other: TransformersProcessSession,
) -> None:
    with pytest.raises(PipelineError, match="Transformers failed"):
        other.generate([[1, 2], [3]], 4)  # of unequal length
    assert other.generate(PROMPTS, 2).tokens.shape == (2, 2)


def test_folder_that_is_no_checkpoint_is_an_error_with_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(ToolError, match="runner transformers"),
        open_process(tmp_path, 128, "cpu", TIMES),
    ):
        pass


def test_runner_on_a_card_says_what_it_lacks(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = CheckpointCompiler(
        max_batch_size=2, max_seq_len=128, max_num_tokens=256, kv_cache_dtype="bfloat16",
        runtime="vllm", runtime_version="0.24.0",
    )  # fmt: skip
    cache = StageCache(root=tmp_path / "cache")
    engine: Engine = compiler.compile(checkpoint, ADA, cache, tmp_path)
    runner = TransformersRunner(device="cuda")
    assert isinstance(runner, Runner)
    assert (runner.device, TransformersRunner().device) == ("cuda", "cpu")
    assert TransformersRunner().why_not(engine) is None
    torch_version = "pipeline.runners.torch_build.version"
    monkeypatch.setattr(torch_version, lambda name: "2.13.0+cpu")
    assert "needs PyTorch built for CUDA, got 2.13.0+cpu" in str(runner.why_not(engine))
    monkeypatch.setattr(torch_version, lambda name: "2.13.0+cu130")
    monkeypatch.setattr("pipeline.runners.transformers.read_conditions", lambda: None)
    assert "NVML shows this process none" in str(runner.why_not(engine))
    with pytest.raises(IncompatibleError, match=r"runner\.device=cuda needs a CUDA device"):
        runner.open(engine)
    other_format = dataclasses.replace(engine, format="trtllm")
    assert "simulates checkpoint engines" in str(runner.why_not(other_format))
