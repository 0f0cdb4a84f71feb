"""The unquantized graph of every architecture computes what Transformers computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.architectures import ARCHITECTURES, ORIGINAL_CONTEXT, WINDOW, tiny_architecture
from tests.formats.decoder.decoders import (
    generate_greedy,
    graph_logits,
    model_greedy,
    model_logits,
    open_graph,
    random_prompt,
    reference,
    write_graph,
)

NEW_TOKENS = 64


@dataclass(frozen=True)
class Case:
    """A model and a context; every row of every forward pass has the same LongRoPE factors."""

    name: str
    context: int
    prompt_lengths: tuple[int, ...]
    overrides: dict[str, Any]


_SHAPES: dict[str, dict[str, Any]] = {
    "head_dim-not-hidden-over-heads": {"head_dim": 24},
    "as-many-kv-heads-as-heads": {"num_key_value_heads": 4},
    "one-layer-one-kv-head": {"num_hidden_layers": 1, "num_key_value_heads": 1},
    "large-epsilon": {"rms_norm_eps": 0.1},
}


def _cases() -> dict[str, Case]:
    cases = {}
    for name in ARCHITECTURES:
        if name in ("phi3-long", "phi4-mini"):
            # Up to the original context Transformers takes the short factors, beyond it the long.
            assert ORIGINAL_CONTEXT < 70
            cases[f"{name}-long-factors"] = Case(name, 192, (70, 96, 121), {})
            wide = {"original_max_position_embeddings": 128}
            cases[f"{name}-short-factors"] = Case(name, 128, (3, 29, 60), wide)
        else:
            cases[name] = Case(name, 192, (3, 40, 121), {})
    for name, overrides in _SHAPES.items():
        cases[name] = Case("llama", 128, (3, 17, 40), overrides)
    return cases


CASES = _cases()


@dataclass(frozen=True)
class Pair:
    """A graph, the Transformers model of the same weights, and prompts for both."""

    graph: Path
    model: Any
    prompts: list[list[int]]


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("architecture")
    model_dir = tiny_architecture(case.name, folder / "model", **case.overrides)
    return Pair(
        graph=write_graph(model_dir, folder / "graph", context=case.context),
        model=reference(model_dir),
        prompts=[random_prompt(length, seed=length) for length in case.prompt_lengths],
    )


def test_logits_are_within_a_thousandth_of_transformers(pair: Pair) -> None:
    for prompt in pair.prompts:
        wanted = model_logits(pair.model, prompt)
        assert np.ptp(wanted) > 1.0  # a flat answer would agree with anything
        np.testing.assert_allclose(graph_logits(pair.graph, prompt), wanted, rtol=0, atol=1e-3)


def test_greedy_tokens_equal_transformers_alone_and_in_a_ragged_batch(pair: Pair) -> None:
    wanted = [model_greedy(pair.model, prompt, NEW_TOKENS) for prompt in pair.prompts]
    assert len({tuple(row) for row in wanted}) == len(pair.prompts)
    loaded = open_graph(pair.graph)
    alone = [generate_greedy(loaded.bind(1), [prompt], NEW_TOKENS)[0] for prompt in pair.prompts]
    assert [row.tolist() for row in alone] == wanted
    batch = generate_greedy(loaded.bind(len(pair.prompts)), pair.prompts, NEW_TOKENS)
    assert batch.tolist() == wanted


@pytest.mark.parametrize("name", ["mistral-sliding", "phi3"])
def test_windowed_prompts_are_longer_than_the_window(name: str, tmp_path: Path) -> None:
    """So that the tests above see it; and a graph that never reaches its window has none."""
    import onnx

    assert max(CASES[name].prompt_lengths) > 4 * WINDOW
    model_dir = tiny_architecture(name, tmp_path / "model")
    masks = {
        context: {
            node.output[0]: node.op_type
            for node in onnx.load(
                write_graph(model_dir, tmp_path / str(context), context=context),
                load_external_data=False,
            ).graph.node
            if node.output[0].endswith("_mask")
        }
        for context in (WINDOW, WINDOW + 1)
    }
    assert masks[WINDOW] == {"attention_mask": "LessOrEqual"}
    assert masks[WINDOW + 1]["attention_mask"] == "And"


@pytest.mark.parametrize("name", ["phi3-long", "phi4-mini"])
def test_a_graph_takes_the_long_factors_where_its_context_exceeds_the_original(
    name: str, tmp_path: Path
) -> None:
    import onnx

    model_dir = tiny_architecture(name, tmp_path / "model")
    rows = {}
    for context in (ORIGINAL_CONTEXT, ORIGINAL_CONTEXT + 1):
        graph = onnx.load(
            write_graph(model_dir, tmp_path / str(context), context=context),
            load_external_data=False,
        ).graph
        (table,) = (t for t in graph.initializer if t.name == "rope_sin")
        rows[context] = onnx.numpy_helper.to_array(table)[1]
    # The long factors turn every frequency more slowly.
    assert (rows[ORIGINAL_CONTEXT + 1] < rows[ORIGINAL_CONTEXT]).all()
