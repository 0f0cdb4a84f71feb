"""Executes the decoder graph with ONNX Runtime on a CPU, in place of an RTX engine.

One buffer is bound both as `past_x` and as `present_x`, so a step writes only the new rows of the
cache and copies nothing (6 ms of 37 per token saved at context 1024 for SmolLM2, measured
2026-11-24).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass

from pipeline.core.errors import CorruptError
from pipeline.core.settings import STRICT
from pipeline.core.values import Engine
from pipeline.formats.trtrtx.onnx_graph import CPU_GRAPH
from pipeline.runners.decode import DecoderSession
from pipeline.runners.runner import Ability, Device, Session

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.runners.decode import Ids


class OnnxRuntimeGraph:
    """A loaded graph; `bind` gives it a cache."""

    def __init__(self, graph: Path, threads: int = 0) -> None:
        """Load `graph` (weights beside it) or raise CorruptError; `threads` 0 takes all cores."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Idle threads sleep, for the reason in `cli.main`.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Without this, QDQ fusion replaces fast float32 GEMMs by a slow integer path that it
        # cannot finish for float8: 308 instead of 40 ms per token (measured 2026-11-24).
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            self.session: Any = onnxruntime.InferenceSession(
                str(graph), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exception classes share no public parent
            raise CorruptError(f"{graph} cannot be loaded by ONNX Runtime: {error}") from error
        caches = [x for x in self.session.get_inputs() if x.name.startswith("past_")]
        self.cache_names = [x.name.removeprefix("past_") for x in caches]
        self.cache_shape: tuple[int, int, int] = tuple(caches[0].shape[1:])
        self.context = self.cache_shape[1]

    def bind(self, batch: int) -> OnnxRuntimeDecoder:
        return OnnxRuntimeDecoder(self, batch)


class OnnxRuntimeDecoder:
    """`pipeline.runners.decode.BoundDecoder` on ONNX Runtime's I/O binding."""

    def __init__(self, graph: OnnxRuntimeGraph, batch: int) -> None:
        import numpy as np
        import onnxruntime

        self.batch, self.context = batch, graph.context
        self._session = graph.session
        self._binding: Any = graph.session.io_binding()
        for name in graph.cache_names:
            zeros = np.zeros((batch, *graph.cache_shape), np.float32)
            cache = onnxruntime.OrtValue.ortvalue_from_numpy(zeros)
            self._binding.bind_ortvalue_input(f"past_{name}", cache)
            self._binding.bind_ortvalue_output(f"present_{name}", cache)

    def step(self, ids: Ids, write_indices: Ids, logits_index: Ids) -> NDArray[np.float32]:
        self._binding.bind_cpu_input("input_ids", ids)
        self._binding.bind_cpu_input("write_indices", write_indices)
        self._binding.bind_cpu_input("logits_index", logits_index)
        self._binding.bind_output("logits")  # new memory: its shape follows logits_index
        self._session.run_with_iobinding(self._binding)
        logits: NDArray[np.float32] = self._binding.get_outputs()[-1].numpy()
        return logits


def graph_session(graph: OnnxRuntimeGraph) -> DecoderSession:
    """A session on a loaded graph."""
    return DecoderSession(graph.bind, context=graph.context, logits_per_step=graph.context)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OnnxRuntimeRunner:
    """Runs the CPU graph of a TensorRT-RTX engine."""

    name: ClassVar[str] = "onnxruntime"
    device: ClassVar[Device] = "cpu"
    abilities: ClassVar[frozenset[Ability]] = frozenset()

    def why_not(self, engine: Engine) -> str | None:
        if engine.cpu_graph_dir is None:
            return f"runner=onnxruntime runs the CPU graph of trtrtx engines, not {engine.format}"
        return None

    def open(self, engine: Engine) -> AbstractContextManager[Session]:
        assert engine.cpu_graph_dir is not None
        graph = OnnxRuntimeGraph(engine.cpu_graph_dir / CPU_GRAPH)
        return nullcontext(graph_session(graph))


KIND = OnnxRuntimeRunner
