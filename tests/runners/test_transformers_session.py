"""The two sessions answer alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.runners.onnxruntime import OnnxRuntimeGraph, OnnxRuntimeSession
from pipeline.runners.session import Session
from pipeline.runners.transformers import TransformersSession, open_source
from tests.formats.decoder.decoders import random_prompt

PROMPT = random_prompt(10, seed=3)
NO_END: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def source(model_dir: Path) -> Iterator[TransformersSession]:
    with open_source(model_dir) as session:
        yield session


@pytest.fixture(scope="module")
def twin(graph: OnnxRuntimeGraph) -> Session:
    return OnnxRuntimeSession(graph)


def test_streams_are_equal(source: TransformersSession, twin: Session) -> None:
    for prompt in (PROMPT, random_prompt(1), random_prompt(20, seed=12)):
        streamed = list(source.stream(prompt, 24, NO_END))
        assert len(streamed) == 24
        assert streamed == list(twin.stream(prompt, 24, NO_END))


def test_streams_end_at_the_same_id(source: TransformersSession, twin: Session) -> None:
    tokens = list(source.stream(PROMPT, 24, NO_END))
    end = frozenset({tokens[5], 319})
    streamed = list(source.stream(PROMPT, 24, end))
    assert streamed == tokens[: tokens.index(tokens[5])]
    assert streamed == list(twin.stream(PROMPT, 24, end))


def test_logits_are_equal(source: TransformersSession, twin: Session) -> None:
    np.testing.assert_allclose(source.logits(PROMPT), twin.logits(PROMPT), rtol=0, atol=1e-3)


def test_timed_generation_gives_the_same_tokens(source: TransformersSession, twin: Session) -> None:
    prompts = [PROMPT, random_prompt(10, seed=13)]
    made = source.generate(prompts, 16)
    assert made.tokens.shape == (2, 16)
    assert made.tokens.tolist() == twin.generate(prompts, 16).tokens.tolist()
    assert made.tokens[0].tolist() == list(source.stream(PROMPT, 16, NO_END))
    assert 0 < made.ttft_s < made.total_s
