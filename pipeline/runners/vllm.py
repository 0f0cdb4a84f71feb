"""Executes checkpoint engines in vLLM, as their own manifest says how to serve them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Lt
from pydantic import PositiveFloat
from pydantic.dataclasses import dataclass

from pipeline.core.gpu import read_conditions
from pipeline.core.settings import STRICT, Listed
from pipeline.core.values import Engine
from pipeline.formats.spec import format_spec
from pipeline.quant.spec import QuantSpec
from pipeline.quant.unified import UnifiedCheckpoint
from pipeline.runners.child import CHILDREN, ChildSession, Program, open_child
from pipeline.runners.runner import BATCHES, NO_CARD, Ability, Device, Session


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VllmRunner:
    """Runs a checkpoint engine in vLLM, in a process that ends with the session.

    Attributes:
        gpu_memory_utilization: Share of the card's memory for weights and KV cache together.
        arguments: More arguments of vLLM's engine, after the package's own.
        load_timeout_s: Longest time for loading, compilation and graph capture included.
        answer_timeout_s: Longest time for one answer.
    """

    name: ClassVar[str] = "vllm"
    device: ClassVar[Device] = "cuda"
    abilities: ClassVar[frozenset[Ability]] = BATCHES | {"request_rate"}

    gpu_memory_utilization: Annotated[PositiveFloat, Lt(1.0)]
    arguments: Listed[str]
    load_timeout_s: PositiveFloat
    answer_timeout_s: PositiveFloat

    def why_not(self, engine: Engine) -> str | None:
        if format_spec(engine.format).runner != self.name:
            return f"runner=vllm does not run {engine.format} engines"
        return self.why_not_here(lambda: UnifiedCheckpoint(engine.dir).precision, engine.runtime)

    def why_not_here(
        self, precision: Callable[[], QuantSpec], runtime: tuple[str, str]
    ) -> str | None:
        """`precision` is asked where there is a card; `runtime` is what the next step names.

        vLLM's `get_min_capability` is our `native_sm` for FP8 (0.24.0, modelopt.py in
        model_executor/layers/quantization).
        """
        if importlib.util.find_spec("vllm") is None:
            wanted = "==".join(runtime) if runtime[0] == "vllm" else "vllm"
            return f"runner=vllm needs the package vllm, not installed here: pip install {wanted}"
        card = read_conditions()
        if card is None:
            return f"runner=vllm needs a CUDA device, and {NO_CARD}, or take runner=transformers"
        if card.sm < (least := precision()).native_sm:
            return (
                f"runner=vllm: vLLM executes {least.title} from SM {least.native_sm} on, "
                f"{card.gpu} has SM {card.sm}; use a newer card, or runner=transformers"
            )
        return None

    def open(self, engine: Engine) -> AbstractContextManager[Session]:
        return self.open_folder(engine.dir, engine.serve_args)

    def open_source(self, weights_dir: Path, context: int) -> AbstractContextManager[Session]:
        arguments = ("--dtype", "bfloat16", "--max-model-len", str(context))
        return self.open_folder(weights_dir, arguments)

    def open_folder(
        self, model_dir: Path, serve_args: Sequence[str]
    ) -> AbstractContextManager[ChildSession]:
        """Load any folder that vLLM reads: a package's `engine/`, or a source model.

        Its logits come with a generated token, so a window must be below `--max-model-len`.
        """
        arguments = {"arguments": self.engine_arguments(model_dir, serve_args)}
        program = Program(
            name="vLLM",
            model=str(CHILDREN / "vllm_model.py"),
            arguments=arguments,
            load_s=self.load_timeout_s,
            answer_s=self.answer_timeout_s,
        )
        return open_child(program)

    def engine_arguments(self, model_dir: Path, serve_args: Sequence[str]) -> tuple[str, ...]:
        """Arguments of vLLM's engine for a measurement; none changes what is computed."""
        return (
            *("--model", str(model_dir)),
            *serve_args,
            "--skip-tokenizer-init",
            "--no-enable-prefix-caching",
            "--max-logprobs=-1",
            *("--gpu-memory-utilization", str(self.gpu_memory_utilization)),
            *self.arguments,
        )


KIND = VllmRunner
