"""Executes TensorRT-LLM engines on the card that they are for. Not run: no such machine at hand."""

from __future__ import annotations

import json
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Le
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.data import read_json_object
from pipeline.core.errors import Fault, IncompatibleError, PipelineError, RecipeError
from pipeline.core.gpu import find_gpu
from pipeline.core.settings import STRICT
from pipeline.core.values import Engine
from pipeline.formats.spec import format_spec
from pipeline.formats.trtllm.place import Place, Shared, Where, choose_place
from pipeline.formats.trtllm.spec import BENCH_PROGRAM, NAME, VERSION
from pipeline.quant.unified import UnifiedCheckpoint
from pipeline.runners.child import CHILDREN, ChildSession, Program, Timeouts, open_child
from pipeline.runners.runner import Ability, BenchResult, Device
from pipeline.runners.session import Session
from pipeline.runners.trtllm_bench import (
    attention_window,
    bench_command,
    mode_of,
    percentiles,
    read_report,
    write_inputs,
)
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
            start=lambda: place.started(command, (children, engine), stage="runner"),
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
        """Run `trtllm-bench` `repeats` times; each run loads the engine anew.

        Raises:
            RecipeError: The workload asks for one token only.
            ToolError: The tool failed.
            PipelineError: It reported another run than was asked for.
        """
        if workload.osl < 2:
            fault = "osl must be 2 or more: trtllm-bench divides by the time after the first token"
            raise RecipeError([Fault(f"workload {workload.name}", fault)])
        place, rounds = self._place(engine.sms[0]), self.bench_rounds
        with tempfile.TemporaryDirectory(prefix="enginesmith-bench-") as name:
            given = Shared(name="input", source=Path(name) / "input")
            made = Shared(name="output", source=Path(name) / "output", read_only=False)
            built = Shared(name="engine", source=engine.dir)
            given.source.mkdir()
            made.source.mkdir()
            write_inputs(
                given.source,
                engine,
                checkpoint_dir,
                workload,
                rounds=rounds,
                seed=seed,
                kv_cache_fraction=self.kv_cache_fraction,
            )
            command = bench_command(
                workload,
                rounds=rounds,
                warmup=self.bench_warmup,
                kv_cache_fraction=self.kv_cache_fraction,
                given=place.path(given),
                made=place.path(made),
                engine_dir=place.path(built),
                options=(given.source / "options.yaml").exists(),
            )
            documents = []
            for _ in range(repeats):
                self._run_bench(place, command, [given, made, built], log_path)
                documents.append(read_json_object(made.source / "report.json"))
        quant_algo = UnifiedCheckpoint(checkpoint_dir).precision.quant_algo
        return BenchResult(
            runs=tuple(
                read_report(one, workload, rounds=rounds, quant_algo=quant_algo)
                for one in documents
            ),
            tool=f"{BENCH_PROGRAM} {VERSION} {mode_of(workload)}",
            requests=workload.batch * rounds,
            percentiles=percentiles(documents[-1]),
        )

    def _run_bench(
        self, place: Place, command: tuple[str, ...], shared: list[Shared], log_path: Path
    ) -> None:
        report = shared[1].source / "report.json"
        report.unlink(missing_ok=True)
        place.run(command, shared, stage="bench", log_path=log_path, timeout_s=self.timeout_s)
        if not report.exists():  # after Ctrl-C the tool ends well without one
            raise PipelineError(f"trtllm-bench ended well, but wrote no report; see {log_path}")

    def _place(self, sm: int) -> Place:
        return choose_place(
            self.where, image=self.image, card=lambda: find_gpu(sm), section="runner"
        )


KIND = TrtLlmRunner
