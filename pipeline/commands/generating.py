"""Chat with a package on this machine: `enginesmith generate smollm2:candidate "Hello"`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pipeline.core.cache import StageCache, cache_root
from pipeline.core.data import shipped
from pipeline.core.errors import IncompatibleError
from pipeline.core.values import Package
from pipeline.formats.spec import format_spec
from pipeline.formats.trtrtx.stage import CPU_GRAPH
from pipeline.machine import require_builder
from pipeline.model.hf import load_tokenizer
from pipeline.registry.reference import reference_of
from pipeline.runners.chat import chat_prompt, eos_ids
from pipeline.runners.session import Session

log = logging.getLogger(__name__)


def stream(package: Package, prompt: str, max_tokens: int) -> Iterator[str]:
    """Yield the pieces of a greedy chat answer.

    Args:
        package: Every byte and every signature verified.
        prompt: One user message.
        max_tokens: The answer ends after so many.

    Raises:
        IncompatibleError: Its format does not run on this machine.
    """
    require_builder(package.manifest["format"])
    tokenizer = load_tokenizer(package.engine_dir)
    with open_package(package) as session:
        tokens = session.stream(chat_prompt(tokenizer, prompt), max_tokens, eos_ids(tokenizer))
        yield from decode_pieces(tokenizer, tokens)


def open_package(package: Package) -> AbstractContextManager[Session]:
    """Load what can run here, and say what that is: the engine itself where its card is."""
    spec = format_spec(package.manifest["format"])
    on_card = {"vllm": _open_vllm, "tensorrt_rtx": _open_trtrtx, "trtllm": _open_trtllm}
    elsewhere = {"transformers": _open_simulation, "onnxruntime": _open_cpu_graph}
    if spec.runner in on_card and (session := on_card[spec.runner](package)):
        return session
    if spec.substitute in elsewhere:
        return elsewhere[spec.substitute](package)
    raise IncompatibleError(f"{spec.name} packages are not run by `generate`")


def _open_simulation(package: Package) -> AbstractContextManager[Session]:
    """The checkpoint, computed by Transformers on this CPU."""
    from pipeline.runners.transformers import open_checkpoint

    log.warning("Simulating the quantized checkpoint in float32 on this CPU")
    return open_checkpoint(package.engine_dir, package.manifest["limits"]["max_seq_len"])


def _open_cpu_graph(package: Package) -> AbstractContextManager[Session]:
    """The graph that the engine was compiled from, on ONNX Runtime."""
    from pipeline.runners.onnxruntime import open_graph

    graph = cpu_graph_of(package) / CPU_GRAPH
    log.warning("Not the engine itself: its graph, on this CPU by ONNX Runtime")
    return open_graph(graph)


def _open_trtllm(package: Package) -> AbstractContextManager[Session] | None:
    """The engine itself, on a machine with its card and TensorRT-LLM or the build image."""
    from pipeline.runners.trtllm import TrtLlmRunner

    runner = TrtLlmRunner(**shipped("runner/trtllm"))
    return runner.open_folder(package.engine_dir, package.manifest["match"]["sm"][0])


def _open_vllm(package: Package) -> AbstractContextManager[Session] | None:
    """The checkpoint in vLLM; None on a machine without vLLM or without a card for FP8."""
    from pipeline.runners.vllm import VllmRunner

    runner = VllmRunner(**shipped("runner/vllm"))
    if runner.why_not_here() is not None:
        return None
    return runner.open_folder(package.engine_dir, tuple(package.manifest["serve"]["args"]))


def _open_trtrtx(package: Package) -> AbstractContextManager[Session] | None:
    """The engine in TensorRT-RTX; None on a machine without that or without the card."""
    from pipeline.runners.tensorrt_rtx import TrtRtxRunner

    runner = TrtRtxRunner(**shipped("runner/tensorrt_rtx"))
    match = package.manifest["match"]
    if runner.why_not_here(tuple(match["sm"]), match["runtime"]["version"]) is not None:
        return None
    return runner.open_folder(package.engine_dir, package.digest)


def cpu_graph_of(package: Package) -> Path:
    """The stage-cache folder with the CPU graph of an RTX package.

    Raises:
        IncompatibleError: This machine's cache does not hold it.
    """
    folder = StageCache(root=cache_root()).cpu_graph(package.manifest["build_key"])
    if folder is None or not (folder / CPU_GRAPH).is_file():
        raise IncompatibleError(
            f"{reference_of(package)} needs a GPU with SM {package.manifest['match']['sm']}, and "
            "its graph for a CPU is not in this machine's cache; make it with: enginesmith build "
            f"{package.manifest['name']} --rebuild"
        )
    return folder


def decode_pieces(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    """Turn tokens into text as they come; a character of several tokens waits for its last."""
    produced: list[int] = []
    shown = ""
    for token in tokens:
        produced.append(token)
        text = tokenizer.decode(produced, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    if produced:
        yield tokenizer.decode(produced, skip_special_tokens=True)[len(shown) :]
