"""Writes decoder graphs, runs them, and asks Transformers the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.formats.trtrtx.graph_writer import WEIGHTS_FILE, write_weights
from pipeline.formats.trtrtx.onnx_graph import build_decoder, save_graph
from pipeline.model.hf import load_model
from pipeline.model.spec import ModelSpec
from pipeline.quant.unified import UnifiedCheckpoint
from pipeline.runners.decode import BoundDecoder, greedy_steps, prefill
from pipeline.runners.onnxruntime import OnnxRuntimeGraph, graph_session
from tests.tiny import VOCAB_SIZE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONTEXT = 128
THREADS = 1


def write_graph(
    model_dir: Path,
    out_dir: Path,
    *,
    context: int = CONTEXT,
    layers: tuple[int, ...] | None = None,
    spec: ModelSpec | None = None,
) -> Path:
    """The float32 graph of a model folder, its weights beside it; `spec` instead of its own."""
    out_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = UnifiedCheckpoint(model_dir)
    slots = write_weights(checkpoint, out_dir / WEIGHTS_FILE)
    vars(checkpoint)["spec"] = spec or checkpoint.spec
    graph = build_decoder(checkpoint, slots, context=context, activation="float32", layers=layers)
    save_graph(graph, out_dir / "cpu.onnx")
    return out_dir / "cpu.onnx"


def open_graph(graph: Path) -> OnnxRuntimeGraph:
    return OnnxRuntimeGraph(graph, threads=THREADS)


def graph_logits(graph: Path, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Logits of every position [tokens, vocab]."""
    return graph_session(open_graph(graph)).logits(tokens)


def model_logits(model: Any, tokens: Sequence[int]) -> NDArray[np.float32]:
    """The same from a Transformers model."""
    import torch

    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.tensor([list(tokens)])).logits[0].numpy()
    return logits


def model_greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens of Transformers' own `generate`, end of sequence ignored."""
    import torch

    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    result: list[int] = generated[0, ids.shape[1] :].tolist()
    return result


def reference(model_dir: Path) -> Any:
    """The Transformers model in float32; `generate` finds no end-of-sequence id in it."""
    model = load_model(model_dir, "float32")
    model.generation_config.eos_token_id = None
    return model


def random_prompt(length: int, seed: int = 0) -> list[int]:
    import numpy as np

    tokens: list[int] = np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).tolist()
    return tokens


def generate_greedy(
    decoder: BoundDecoder, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> NDArray[np.int64]:
    """Greedy tokens [batch, max_new_tokens], end-of-sequence ignored."""
    import numpy as np

    state = prefill(decoder, prompts)
    return np.stack(list(greedy_steps(decoder, state, max_new_tokens)), axis=1)
