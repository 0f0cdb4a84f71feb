"""Executes TensorRT-LLM engines on the card that they are for. Not run: no such machine at hand."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from typing import Annotated, ClassVar

from annotated_types import Le
from pydantic import PositiveFloat
from pydantic.dataclasses import dataclass

from pipeline.core.errors import PipelineError
from pipeline.core.gpu import find_gpu
from pipeline.core.settings import STRICT
from pipeline.core.values import Engine
from pipeline.formats.spec import format_spec
from pipeline.formats.trtllm.place import Shared, ToolHost, Where, choose_place
from pipeline.formats.trtllm.spec import NAME, VERSION
from pipeline.runners.child import CHILDREN, ChildSession, Program, open_child
from pipeline.runners.runner import Ability, Device


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrtLlmRunner:
    """Runs an engine in TensorRT-LLM, on this machine or in the build image, as its compiler.

    The KV cache gets `kv_cache_fraction` of the memory that is left after loading. After
    `timeout_s` a load or an answer is stopped.
    """

    name: ClassVar[str] = "trtllm"
    device: ClassVar[Device] = "cuda"
    abilities: ClassVar[frozenset[Ability]] = frozenset({"requests"})

    where: Where
    image: str
    kv_cache_fraction: Annotated[PositiveFloat, Le(1.0)]
    timeout_s: PositiveFloat

    def why_not(self, engine: Engine) -> str | None:
        if format_spec(engine.format).runner != self.name:
            return f"runner=trtllm does not run {engine.format} engines"
        if engine.runtime != (NAME, VERSION):
            return (
                f"the engine is for {' '.join(engine.runtime)}, this runner is {NAME} {VERSION}: "
                "an engine runs only in the release that built it"
            )
        try:
            self._place(engine.sms[0])
        except PipelineError as error:
            return f"runner=trtllm cannot run here: {error}"
        return None

    def open(self, engine: Engine) -> AbstractContextManager[ChildSession]:
        place = self._place(engine.sms[0])
        built = json.loads((engine.dir / "config.json").read_text())["build_config"]
        folder = Shared(name="engine", source=engine.dir)
        children = Shared(name="children", source=CHILDREN)
        chunked = built["plugin_config"]["use_paged_context_fmha"]
        command = (place.python, "-P", f"{place.path(children)}/main.py")
        program = Program(
            name="TensorRT-LLM",
            model=f"{place.path(children)}/trtllm_model.py",
            arguments={
                "engine_dir": place.path(folder),
                "context": built["max_seq_len"],
                "kv_cache_fraction": self.kv_cache_fraction,
                "attention_window": attention_window(engine),
                "chunked_prefill": bool(chunked and built["max_num_tokens"] < built["max_seq_len"]),
            },
            load_s=self.timeout_s,
            answer_s=self.timeout_s,
            start=lambda: place.started(command, (children, folder), stage="runner"),
        )
        return open_child(program)

    def _place(self, sm: int) -> ToolHost:
        return choose_place(
            self.where, image=self.image, card=lambda: find_gpu(sm), section="runner"
        )


def attention_window(engine: Engine) -> int | None:
    """The sliding window that the runtime needs; None where the context stays inside it.

    TensorRT-LLM's engines do not hold it (pipeline.formats.trtllm).
    """
    window: int | None = engine.checks.get("conversion", {}).get("attention_window")
    return window if window is not None and engine.limits.max_seq_len > window else None


KIND = TrtLlmRunner
