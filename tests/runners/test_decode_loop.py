"""The decode loop on a real graph."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.errors import RecipeError
from pipeline.runners.decode import prefill
from pipeline.runners.onnxruntime import OnnxRuntimeGraph, graph_session
from pipeline.runners.transformers import open_source
from tests.formats.decoder.decoders import generate_greedy, random_prompt

PROMPT = random_prompt(10, seed=3)


def continuation(graph: OnnxRuntimeGraph, count: int) -> list[int]:
    tokens: list[int] = generate_greedy(graph.bind(1), [PROMPT], count)[0].tolist()
    return tokens


@pytest.mark.parametrize(
    ("batch", "prompts", "shown"),
    [
        (1, [[]], "wanted one or more of 1 token or more"),
        (1, [], "got 0 prompts, wanted one or more"),
        (1, [[5] * 49], "a prompt of 49 tokens .* holds 48 tokens of a request"),
        (2, [[5]], "got 1 prompts; wanted 2"),
        (1, [[5], [6]], "got 2 prompts; wanted 1"),
    ],
)
def test_prefill_refuses_prompts_that_do_not_fit(
    graph: OnnxRuntimeGraph, batch: int, prompts: list[list[int]], shown: str
) -> None:
    with pytest.raises(RecipeError, match=shown):
        prefill(graph.bind(batch), prompts)


def test_generation_ends_where_the_longest_row_fills_the_context(graph: OnnxRuntimeGraph) -> None:
    """The last token is predicted from a full cache."""
    full = random_prompt(48, seed=4)
    (token,) = generate_greedy(graph.bind(1), [full], 10)[0]
    assert token == prefill(graph.bind(1), [full]).logits[0].argmax()
    prompts = [PROMPT, random_prompt(40, seed=5)]
    assert generate_greedy(graph.bind(2), prompts, 1000).shape == (2, 48 - 40 + 1)


def test_transformers_answers_as_the_graph(graph: OnnxRuntimeGraph, model_dir: Path) -> None:
    import numpy as np

    twice = [PROMPT, random_prompt(10, seed=13)]
    own = graph_session(graph)
    with open_source(model_dir) as source:
        for prompt in (PROMPT, random_prompt(1), random_prompt(20, seed=12)):
            streamed = list(source.stream(prompt, 24, frozenset()))
            assert streamed == list(own.stream(prompt, 24, frozenset()))
        stop = frozenset({streamed[5], 319})
        assert list(source.stream(prompt, 24, stop)) == list(own.stream(prompt, 24, stop))
        np.testing.assert_allclose(source.logits(PROMPT), own.logits(PROMPT), rtol=0, atol=1e-3)
        made = source.generate(twice, 16)
    assert made.tokens.tolist() == own.generate(twice, 16).tokens.tolist()
    assert 0 < made.ttft_s < made.total_s


def test_stale_cache_does_not_change_answers(graph: OnnxRuntimeGraph) -> None:
    wanted = continuation(graph, 12)
    decoder = graph.bind(1)
    generate_greedy(decoder, [random_prompt(40, seed=6)], 9)  # fills the whole cache
    assert generate_greedy(decoder, [PROMPT], 12)[0].tolist() == wanted


def test_rows_of_a_batch_do_not_see_each_other(graph: OnnxRuntimeGraph) -> None:
    prompts = [PROMPT, random_prompt(4, seed=8), random_prompt(21, seed=9)]
    batch = generate_greedy(graph.bind(3), prompts, 12).tolist()
    others = [PROMPT, random_prompt(30, seed=10), random_prompt(2, seed=11)]
    assert batch[0] == generate_greedy(graph.bind(3), others, 12).tolist()[0]
    assert batch[0] == continuation(graph, 12)
