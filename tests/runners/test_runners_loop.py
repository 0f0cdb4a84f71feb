"""The decode loop and chat: stopping, stale caches, and text that comes in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.commands.generating import decode_pieces
from pipeline.core.errors import RecipeError
from pipeline.formats.trtrtx.graph_writer import write_weights
from pipeline.formats.trtrtx.onnx_graph import build_decoder, save_graph
from pipeline.model.hf import load_tokenizer
from pipeline.quant.unified import UnifiedCheckpoint
from pipeline.runners.chat import chat_prompt, eos_ids
from pipeline.runners.decode import prefill, stream_greedy
from pipeline.runners.onnxruntime import OnnxRuntimeGraph, OnnxRuntimeSession
from pipeline.runners.transformers import open_source
from tests.tiny import tiny_model

CONTEXT = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def graph(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntimeGraph:
    out = tmp_path_factory.mktemp("graph")
    checkpoint = UnifiedCheckpoint(folder)
    slots = write_weights(checkpoint, out / "weights.bin")
    model = build_decoder(checkpoint, slots, context=CONTEXT, activation="float32")
    save_graph(model, out / "graph.onnx")
    return OnnxRuntimeGraph(out / "graph.onnx", threads=1)


@pytest.mark.parametrize("prompts", [[[]], [[5] * (CONTEXT + 1)], [[5], [6]]])
def test_prompts_that_do_not_fit_are_refused(
    graph: OnnxRuntimeGraph, prompts: list[list[int]]
) -> None:
    with pytest.raises(RecipeError, match="wanted 1 of 1 to 32 tokens"):
        prefill(graph.bind(1), prompts)


def test_every_eos_id_ends_the_answer_and_is_not_part_of_it(graph: OnnxRuntimeGraph) -> None:
    def answer(*eos: int) -> list[int]:
        return list(
            stream_greedy(graph.bind(1), [5, 6, 7], max_new_tokens=20, eos_token_ids=frozenset(eos))
        )

    free = answer()
    assert len(free) == 20
    for stop in sorted(set(free)):
        assert answer(stop, -1) == free[: free.index(stop)]


def test_answer_ends_where_the_context_is_full(graph: OnnxRuntimeGraph) -> None:
    tokens = stream_greedy(graph.bind(1), [5] * 30, max_new_tokens=20, eos_token_ids=frozenset())
    # 30 in the cache, two more are written; the third is predicted from the full cache.
    assert len(list(tokens)) == 3


def test_stale_cache_changes_nothing(graph: OnnxRuntimeGraph) -> None:
    session = OnnxRuntimeSession(graph)
    fresh = list(session.stream([9, 8, 7], 10, frozenset()))
    session.logits(list(range(40, 40 + CONTEXT)))
    assert list(session.stream([9, 8, 7], 10, frozenset())) == fresh


def test_cache_is_updated_in_place(graph: OnnxRuntimeGraph) -> None:
    decoder = graph.bind(1)
    decoder.step(np.array([[5, 6]]), np.zeros(1, np.int64), np.array([[1]]))
    outputs = decoder._binding.get_outputs()
    addresses = [value.data_ptr() for value in outputs if len(value.shape()) == 4]
    assert addresses
    decoder.step(np.array([[7]]), np.array([2]), np.array([[0]]))
    outputs = decoder._binding.get_outputs()
    assert [value.data_ptr() for value in outputs if len(value.shape()) == 4] == addresses
    first = next(value for value in outputs if len(value.shape()) == 4).numpy()
    assert np.abs(first[0, 0, :3]).min(axis=-1).all()  # three rows are written
    assert not first[0, 0, 3:].any()


def test_transformers_streams_the_same_answer(folder: Path, graph: OnnxRuntimeGraph) -> None:
    with open_source(folder) as session:
        wanted = list(session.stream([9, 8, 7], 12, frozenset()))
    assert list(OnnxRuntimeSession(graph).stream([9, 8, 7], 12, frozenset())) == wanted


@pytest.mark.parametrize(("declared", "wanted"), [(7, {7}), ([7, 9, 11], {7, 9, 11}), (None, {2})])
def test_eos_ids_are_those_of_the_generation_config(
    tmp_path: Path, declared: object, wanted: set[int]
) -> None:
    folder = tiny_model(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
    assert eos_ids(load_tokenizer(folder)) == wanted


def test_chat_prompt_ends_where_the_answer_starts(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(chat_prompt(tokenizer, "Hi")).endswith("<|im_start|>assistant\n")


def test_pieces_join_to_the_text_and_never_split_a_character(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    text = "héllo 🚀 wörld"

    def tokens() -> Iterator[int]:
        yield from tokenizer(text)["input_ids"]

    pieces = list(decode_pieces(tokenizer, tokens()))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
