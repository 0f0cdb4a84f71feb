"""The unquantized graph of every architecture computes what Transformers computes.

And the convert stage: the cut that stands in for the whole graph has its window.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pipeline.core.cache import StageCache
from pipeline.formats.trtrtx.graph_writer import write_weights
from pipeline.formats.trtrtx.onnx_graph import (
    CPU_CUT,
    CPU_GRAPH,
    RTX_CUT,
    RTX_GRAPH,
    GraphSettings,
    build_decoder,
    convert,
    cut_context,
    save_graph,
)
from pipeline.model.read import read_spec
from pipeline.model.spec import ModelSpec, YarnScaling
from pipeline.quant.unified import UnifiedCheckpoint
from tests.architectures import (
    ARCHITECTURES,
    ORIGINAL_CONTEXT,
    WINDOW,
    covering,
    llama3_rope,
    longrope,
    tiny_architecture,
    tiny_fp8_architecture,
    yarn,
)
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
from tests.tiny import tiny_model

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
_QWEN3_SHAPES: dict[str, dict[str, Any]] = {
    **_SHAPES,
    "untied": {"tie_word_embeddings": False},
    "head_dim-hidden-over-heads": {"head_dim": 16},
    "seven-heads-to-a-kv-head": {"num_attention_heads": 14},
    "odd-sizes": {"hidden_size": 75, "intermediate_size": 101, "num_attention_heads": 6},
    "window": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    "llama3-rope": {"rope_scaling": llama3_rope(8.0)},
    "longrope": {"rope_scaling": longrope(16), "original_max_position_embeddings": 128},
}
_PHI4_SHAPES: dict[str, dict[str, Any]] = {
    **{name: _SHAPES[name] for name in ("one-layer-one-kv-head", "large-epsilon")},
    "as-many-kv-heads-as-heads": {"num_key_value_heads": 6},
    "untied": {"tie_word_embeddings": False},
    "heads-of-16": {"hidden_size": 96, "rope_scaling": longrope(6)},
    "odd-sizes": {"hidden_size": 144, "intermediate_size": 101, "rope_scaling": longrope(9)},
    "window": {"sliding_window": WINDOW},
    "half-rotary": {"partial_rotary_factor": 0.5, "rope_scaling": longrope(8)},
    "whole-rotary": {"partial_rotary_factor": 1.0, "rope_scaling": longrope(16)},
    "plain-rope": {"rope_scaling": None},
}
_FULL, _NEAR = "full_attention", "sliding_attention"
_GEMMA: dict[str, dict[str, Any]] = {
    "untied": {"tie_word_embeddings": False},
    "as-many-kv-heads-as-heads": {"num_key_value_heads": 4},
    "two-kv-heads-of-16": {"num_key_value_heads": 2, "head_dim": 16},
    "odd-sizes": {"hidden_size": 72, "intermediate_size": 200, "num_attention_heads": 6},
    "windows-everywhere": {"layer_types": [_NEAR] * 3},
    "windows-nowhere": {"layer_types": [_FULL] * 3},
    "window-first-and-last": {"layer_types": [_NEAR, _FULL, _NEAR]},
    "window-of-two": {"sliding_window": 2},
    "window-beyond-the-context": {"sliding_window": 500},
    "linear-scaling": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "bases-far-apart": {"rope_theta": 1e7, "rope_local_base_freq": 100.0},
    "scalar-of-168": {"query_pre_attn_scalar": 168},
    "large-epsilon": {"rms_norm_eps": 0.1},
}
_MINISTRAL: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "as-many-kv-heads-as-heads": {"num_key_value_heads": 4},
    "one-layer-one-kv-head": {"num_hidden_layers": 1, "num_key_value_heads": 1},
    "heads-of-24": {"head_dim": 24},
    "odd-sizes": {"hidden_size": 72, "intermediate_size": 200, "num_attention_heads": 6},
    "window": {"sliding_window": WINDOW},
    "queries-as-they-are": {"rope_parameters": yarn(llama_4_scaling_beta=0.0)},
    "original-context-beyond-the-graphs": {
        "rope_parameters": yarn(original_max_position_embeddings=200)
    },
    "gain-of-the-paper": {"rope_parameters": yarn(mscale=None, mscale_all_dim=None)},
    "gain-of-a-quotient": {"rope_parameters": yarn(mscale=1.0, mscale_all_dim=0.3)},
    "gain-stated": {"rope_parameters": yarn(attention_factor=1.3)},
    "edges-between-pairs": {"rope_parameters": yarn(truncate=False, beta_fast=8.0)},
    "large-base": {"rope_parameters": yarn(rope_theta=1e6, factor=2.0)},
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
    for family, context, lengths, shapes in (
        ("llama", 128, (3, 17, 40), _SHAPES),
        ("mistral", 128, (3, 17, 40), {"head_dim-as-in-nemo": {"head_dim": 32}}),
        ("qwen3", 128, (3, 17, 40), _QWEN3_SHAPES),
        ("phi4-mini", 128, (3, 17, 40), _PHI4_SHAPES),
        ("gemma3", 128, (3, 30, 60), _GEMMA),
        ("ministral3", 160, (3, 30, 90), _MINISTRAL),
    ):
        short = {"original_max_position_embeddings": 128} if family == "phi4-mini" else {}
        for name, overrides in shapes.items() if family in ARCHITECTURES else ():
            cases[f"{family}-{name}"] = Case(family, context, lengths, {**short, **overrides})
    return cases


CASES = _cases()
_KEPT = {
    *ARCHITECTURES,
    *(name for name in CASES if name.endswith(("-long-factors", "-short-factors", "-odd-sizes"))),
    *("llama-head_dim-not-hidden-over-heads", "mistral-head_dim-as-in-nemo", "phi4-mini-window"),
    *("gemma3-window-first-and-last", "gemma3-linear-scaling", "ministral3-gain-stated"),
}


@dataclass(frozen=True)
class Pair:
    """A graph, the Transformers model of the same weights, and prompts for both."""

    graph: Path
    model: Any
    prompts: list[list[int]]


@pytest.fixture(scope="module", params=covering(CASES, _KEPT), ids=str)
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
    assert max(CASES[name].prompt_lengths) > 4 * WINDOW
    model_dir = tiny_architecture(name, tmp_path / "model")
    for context, kind in ((WINDOW, "LessOrEqual"), (WINDOW + 1, "And")):
        graph = write_graph(model_dir, tmp_path / str(context), context=context)
        nodes = onnx.load(graph, load_external_data=False).graph.node
        kinds = {node.output[0]: node.op_type for node in nodes}
        assert kinds["attention_mask"] == kind


@pytest.mark.parametrize("name", ["phi3-long", "phi4-mini"])
def test_a_graph_takes_the_long_factors_where_its_context_exceeds_the_original(
    name: str, tmp_path: Path
) -> None:
    model_dir = tiny_architecture(name, tmp_path / "model")
    rows = {}
    for context in (ORIGINAL_CONTEXT, ORIGINAL_CONTEXT + 1):
        path = write_graph(model_dir, tmp_path / str(context), context=context)
        graph = onnx.load(path, load_external_data=False).graph
        (table,) = (t for t in graph.initializer if t.name == "rope_sin")
        rows[context] = onnx.numpy_helper.to_array(table)[1]
    # The long factors turn every frequency more slowly.
    assert (rows[ORIGINAL_CONTEXT + 1] < rows[ORIGINAL_CONTEXT]).all()


def with_layer(spec: ModelSpec, number: int, **changes: Any) -> ModelSpec:
    """One layer changed; what a layer lacks is of its attention."""
    layer = spec.layers[number]
    if changes.keys() <= vars(layer).keys():
        layer = replace(layer, **changes)
    else:
        layer = replace(layer, attention=replace(layer.attention, **changes))
    return replace(spec, layers=(*spec.layers[:number], layer, *spec.layers[number + 1 :]))


def ministral_faults(spec: ModelSpec) -> Iterator[ModelSpec]:
    """The specs that differ from Ministral 3's in one thing, on one layer."""
    rope = spec.layers[0].attention.rope
    yarned = rope.scaling
    assert isinstance(yarned, YarnScaling)
    for changes in (
        {"query_beta": 0.0},
        {"query_beta": 0.1},
        {"original_max_position_embeddings": 41},
        {"factor": 8.0},
        {"beta_fast": 2.0},
        {"beta_slow": 2.0},
        {"attention_factor": 1.1},
        {"original_max_position_embeddings": 128},
    ):
        yield with_layer(spec, 0, rope=replace(rope, scaling=replace(yarned, **changes)))
    yield with_layer(spec, 0, rope=replace(rope, scaling=None))


def gemma_faults(spec: ModelSpec) -> Iterator[ModelSpec]:
    """The specs that differ from Gemma 3's in one thing."""
    first, second = spec.layers[:2]
    for norm in first.norms:
        yield with_layer(spec, 0, norms=tuple(one for one in first.norms if one is not norm))
    yield with_layer(spec, 0, activation="silu")
    yield with_layer(spec, 0, rope=second.attention.rope)
    yield with_layer(spec, 1, rope=first.attention.rope)
    yield with_layer(spec, 0, window=WINDOW - 1)
    yield with_layer(spec, 0, window=WINDOW + 1)
    yield with_layer(spec, 1, window=WINDOW)
    scaled = spec
    for number in range(spec.num_layers):
        scaled = with_layer(scaled, number, scale=32**-0.5)
    yield scaled
    yield replace(spec, norm_offset=0.0)
    yield replace(spec, embedding_scale=1.0)


@pytest.mark.parametrize(
    ("name", "faults", "count"),
    [
        case
        for case in (("gemma3", gemma_faults, 6 + 9), ("ministral3", ministral_faults, 9))
        if case[0] in ARCHITECTURES
    ],
)
def test_every_difference_of_a_layer_shows_in_the_logits(
    name: str, faults: Callable[[ModelSpec], Iterator[ModelSpec]], count: int, tmp_path: Path
) -> None:
    """Each norm left out, 1 + w forgotten, one layer's base, window or activation wrong."""
    model_dir = tiny_architecture(name, tmp_path)
    prompt = random_prompt(100)
    wanted = model_logits(reference(model_dir), prompt)
    made = list(faults(UnifiedCheckpoint(model_dir).spec))
    assert len(made) == count
    for number, fault in enumerate(made):
        graph = write_graph(model_dir, tmp_path / str(number), spec=fault)
        assert np.abs(graph_logits(graph, prompt) - wanted).max() > 0.01, number


@pytest.fixture(scope="module")
def plain_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("plain"))


def test_logits_index_selects_the_positions_of_each_row(plain_dir: Path, tmp_path: Path) -> None:
    plain_graph = write_graph(plain_dir, tmp_path)
    prompts = [random_prompt(9, seed=1), random_prompt(9, seed=2)]
    wanted = [graph_logits(plain_graph, prompt) for prompt in prompts]
    picked = np.array([[8, 0, 3], [5, 5, 1]], np.int64)
    decoder = open_graph(plain_graph).bind(2)
    logits = decoder.step(np.array(prompts, np.int64), np.zeros(2, np.int64), picked)
    for row in range(2):
        np.testing.assert_allclose(logits[row], wanted[row][picked[row]], rtol=0, atol=1e-4)


@pytest.mark.parametrize("activation", ["bfloat16", "float16"])
def test_sixteen_bit_graphs_are_valid_onnx_of_that_dtype(
    plain_dir: Path, tmp_path: Path, activation: Any
) -> None:
    checkpoint = UnifiedCheckpoint(plain_dir)
    slots = write_weights(checkpoint, tmp_path / "weights.bin")
    save_graph(
        build_decoder(checkpoint, slots, context=32, activation=activation), tmp_path / "g.onnx"
    )
    onnx.checker.check_model(str(tmp_path / "g.onnx"), full_check=True)
    graph = onnx.load(tmp_path / "g.onnx", load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.output}
    assert types.pop("logits") == onnx.TensorProto.FLOAT
    assert set(types.values()) == {getattr(onnx.TensorProto, activation.upper())}
    modules = {node.name for node in graph.node}
    assert {
        f"model.layers.{layer}.{part}"
        for layer in range(3)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    } <= modules


SETTINGS = GraphSettings(context=160, activation="bfloat16")


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_fp8_architecture("phi3", tmp_path_factory.mktemp("checkpoint"))


def config_of(checkpoint_dir: Path, **changes: object) -> ModelSpec:
    text = json.loads((checkpoint_dir / "config.json").read_text())
    return read_spec(text | changes)


@pytest.mark.parametrize(
    ("window", "context", "wanted"),
    [
        (None, 4096, 64),
        (None, 32, 32),
        (2047, 4096, 2111),
        (2047, 2048, 2048),
        (2047, 2047, 64),  # nothing is ever hidden: that graph has no window
        (262144, 4096, 64),
    ],
)
def test_cut_reaches_beyond_a_window_that_the_graph_has(
    checkpoint_dir: Path, window: int | None, context: int, wanted: int
) -> None:
    assert cut_context(config_of(checkpoint_dir, sliding_window=window), context) == wanted


def test_cuts_have_the_window_of_the_whole_graph(checkpoint_dir: Path, tmp_path: Path) -> None:
    graphs = convert(checkpoint_dir, "digest", SETTINGS, StageCache(root=tmp_path))
    for name in (RTX_GRAPH, CPU_GRAPH, RTX_CUT, CPU_CUT):
        graph = onnx.load(graphs.dir / name, load_external_data=False).graph
        kinds = {node.output[0]: node.op_type for node in graph.node}
        assert kinds["attention_mask"] == "And"
        cache = next(tensor for tensor in graph.input if tensor.name == "past_key.0")
        context = cache.type.tensor_type.shape.dim[2].dim_value
        assert context == (WINDOW + 64 if "cut" in name else SETTINGS.context)
