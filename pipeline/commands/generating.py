"""Chat with a package on this machine: `enginesmith generate smollm2:candidate "Hello"`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from pipeline.core.cache import StageCache
from pipeline.core.errors import IncompatibleError
from pipeline.core.published import Package
from pipeline.core.settings import cache_root, read_mark, shipped
from pipeline.core.values import engine_of
from pipeline.formats.spec import format_spec
from pipeline.machine import require_builder
from pipeline.model.hf import load_tokenizer
from pipeline.registry.reference import reference_of
from pipeline.runners.runner import Runner, Session
from pipeline.runners.workload import chat_prompt, eos_ids

log = logging.getLogger(__name__)


def stream(package: Package, prompt: str, max_tokens: int) -> Iterator[str]:
    """Yield the pieces of a greedy chat answer by a package that was verified."""
    require_builder(package.manifest["format"])
    tokenizer = load_tokenizer(package.engine_dir)
    with open_package(package) as session:
        tokens = session.stream(chat_prompt(tokenizer, prompt), max_tokens, eos_ids(tokenizer))
        yield from decode_pieces(tokenizer, tokens)


def open_package(package: Package) -> AbstractContextManager[Session]:
    """Load what can run here, and say what that is: the engine itself where its card is."""
    engine, spec = engine_of(package), format_spec(package.manifest["format"])
    runner = shipped_runner(spec.runner)
    if (reason := runner.why_not(engine)) is None:
        return runner.open(engine)
    log.debug("The engine does not run here: %s", reason)
    if spec.substitute == spec.runner:
        raise IncompatibleError(f"{reference_of(package)} does not run here: {reason}")
    graph = StageCache(root=cache_root()).cpu_graph(package.manifest["build_key"])
    engine, runner = replace(engine, cpu_graph_dir=graph), shipped_runner(spec.substitute)
    if runner.why_not(engine) is not None:
        raise IncompatibleError(
            f"{reference_of(package)} does not run here ({reason}), and its graph for a CPU is not "
            f"in this machine's cache; make it with: enginesmith build {package.manifest['name']} "
            "--rebuild"
        )
    log.warning("Not the engine itself: %s answers for it on this CPU", runner.name)
    return runner.open(engine)


def shipped_runner(kind: str) -> Runner:
    """The runner of that kind with the settings that it ships with."""
    runner: Runner = read_mark(f"pipeline.runners.{kind}", "KIND")(**shipped(f"runner/{kind}"))
    return runner


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
