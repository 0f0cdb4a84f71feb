"""Executes TensorRT-LLM engines on the card that they are for. Not run: no such machine at hand."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Le
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.errors import IncompatibleError, PipelineError
from pipeline.core.gpu import find_gpu
from pipeline.core.settings import STRICT
from pipeline.core.values import Engine
from pipeline.formats.spec import format_spec
from pipeline.formats.trtllm.container import Shared
from pipeline.formats.trtllm.place import Place, Where, choose_place
from pipeline.formats.trtllm.release import NAME, VERSION
from pipeline.runners.child import CHILDREN, ChildSession, Program, Timeouts, open_child
from pipeline.runners.runner import Ability, BenchResult, Device
from pipeline.runners.session import Session
from pipeline.runners.trtllm_bench import BenchSettings, attention_window, measure
from pipeline.runners.workload import Workload


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrtLlmRunner:
    """Runs an engine in TensorRT-LLM, on this machine or in the build image.

    Attributes:
        where: As of the compiler.
        image: The build image.
        kv_cache_fraction: Share of the memory left after loading that the KV cache gets.
        bench_rounds: Batches that one run of `trtllm-bench` measures, one after the other.
        bench_warmup: Requests before them.
        timeout_s: After so long a run of `trtllm-bench`, a load or an answer is stopped.
    """

    name: ClassVar[str] = "trtllm"
    device: ClassVar[Device] = "cuda"
    abilities: ClassVar[frozenset[Ability]] = frozenset()
    """`trtllm-bench` has no option for arrivals and one end-of-sequence id at most.

    Its dataset has output tokens of each request, but the release sets them on one object that
    requests which wait share, so lengths that differ are not known to be kept.
    """

    where: Where
    image: str
    kv_cache_fraction: Annotated[PositiveFloat, Le(1.0)]
    bench_rounds: PositiveInt
    bench_warmup: NonNegativeInt
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

    def open(self, engine: Engine) -> AbstractContextManager[Session]:
        if reason := self.why_not(engine):
            raise IncompatibleError(reason)
        return self.open_folder(engine.dir, engine.sms[0], attention_window(engine))

    def open_folder(
        self, engine_dir: Path, sm: int, window: int | None = None
    ) -> AbstractContextManager[ChildSession]:
        """Load the `engine/` folder of a package.

        Args:
            engine_dir: The folder.
            sm: Compute capability x 10 that it is for.
            window: Sliding window that the runtime needs; None for none.

        Raises:
            IncompatibleError: It cannot run here.
        """
        place = self._place(sm)
        built = json.loads((engine_dir / "config.json").read_text())["build_config"]
        engine = Shared(name="engine", source=engine_dir)
        children = Shared(name="children", source=CHILDREN)
        chunked = built["plugin_config"]["use_paged_context_fmha"]

        command = (place.python, "-P", f"{place.path(children)}/main.py")
        program = Program(
            name="TensorRT-LLM",
            model=f"{place.path(children)}/trtllm_model.py",
            arguments={
                "engine_dir": place.path(engine),
                "context": built["max_seq_len"],
                "kv_cache_fraction": self.kv_cache_fraction,
                "attention_window": window,
                "chunked_prefill": bool(chunked and built["max_num_tokens"] < built["max_seq_len"]),
            },
            start=lambda: place.interactive(command, (children, engine), stage="runner"),
        )
        return open_child(program, Timeouts(load_s=self.timeout_s, answer_s=self.timeout_s))

    def bench(
        self,
        engine: Engine,
        checkpoint_dir: Path,
        workload: Workload,
        *,
        repeats: int,
        seed: int,
        log_path: Path,
    ) -> BenchResult:
        """Measure one workload; see `pipeline.runners.trtllm_bench.measure`."""
        settings = BenchSettings(
            rounds=self.bench_rounds,
            warmup=self.bench_warmup,
            kv_cache_fraction=self.kv_cache_fraction,
            timeout_s=self.timeout_s,
            seed=seed,
        )
        return measure(
            engine,
            checkpoint_dir,
            workload,
            place=self._place(engine.sms[0]),
            settings=settings,
            repeats=repeats,
            log_path=log_path,
        )

    def _place(self, sm: int) -> Place:
        return choose_place(
            self.where, image=self.image, card=lambda: find_gpu(sm), section="runner"
        )


KIND = TrtLlmRunner
