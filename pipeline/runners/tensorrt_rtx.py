"""Executes a TensorRT-RTX engine itself, with a cache on a card whose SM it was compiled for.

Names and signatures are those of tensorrt_rtx 1.7.1, read from the installed package and tried on a
stand-in that refuses what its documentation forbids; no card was there to run it on.

Past and present of a layer are one buffer. A prefill takes fewer rows than the cache has, so its
rows go in groups, each on its own part of the same buffers.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PositiveFloat
from pydantic.dataclasses import dataclass

from pipeline.core.errors import CorruptError, Fault, IncompatibleError, PipelineError, RecipeError
from pipeline.core.gpu import read_conditions
from pipeline.core.settings import STRICT, cache_root
from pipeline.core.values import Engine
from pipeline.formats.spec import format_spec
from pipeline.formats.trtrtx.spec import PACKAGE, PLAN_FILE
from pipeline.runners.child import ChildSession, Program, open_child, session_program
from pipeline.runners.decode import DecoderSession
from pipeline.runners.runner import (
    BATCHES,
    NO_CARD,
    Ability,
    Device,
    installed_version,
    torch_fault,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from pipeline.runners.decode import Ids

ALIGNMENT_BYTES = 256
"""Of every address that is bound: what TensorRT-RTX asks of device memory that it is given
(docstring of `IExecutionContext.set_device_memory`, 1.7.1)."""
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
"""Names of `tensorrt_rtx.DataType` -> NumPy's words."""


class CudaDevice:
    """The first CUDA device of this process, by way of PyTorch.

    Its stream becomes PyTorch's current one, so that allocations, copies and kernels are in one
    order; not the default one, with which TensorRT would synchronize the whole device (docstring of
    `execute_async_v3`, 1.7.1).
    """

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise IncompatibleError(
                f"PyTorch {torch.__version__} sees no CUDA device; see nvidia-smi and "
                "CUDA_VISIBLE_DEVICES, install a PyTorch built for CUDA, or take "
                "runner=onnxruntime, its graph on a CPU"
            )
        self._torch = torch
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._stream)

    @property
    def stream(self) -> int:
        return int(self._stream.cuda_stream)

    def zeros(self, count: int, dtype: str) -> torch.Tensor:
        """`dtype` in NumPy's words, `bfloat16` among them."""
        return self._torch.zeros(count, dtype=getattr(self._torch, dtype), device="cuda")

    def upload(self, values: Ids, target: torch.Tensor) -> None:
        """Copy to the start of `target`; `values` may change as soon as this returns."""
        # Blocking, from pageable memory: it returns when `values` has been read.
        target[: values.size].copy_(self._torch.from_numpy(values.reshape(-1)))

    def download(self, source: torch.Tensor, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A copy of the start of `source`, to be read only after `synchronize`."""
        # Page-locked: only then is the copy asynchronous, and at the bus's speed.
        host = self._torch.empty(shape, dtype=source.dtype, pin_memory=True)
        host.view(-1).copy_(source[: host.numel()], non_blocking=True)
        copied: NDArray[np.float32] = host.numpy()
        return copied

    def synchronize(self) -> None:
        self._stream.synchronize()


class StepContext:
    """One execution context on one optimization profile; sets only what changed."""

    def __init__(self, engine: Any, index: int, context: Any, device: CudaDevice) -> None:
        low, _, high = engine.get_tensor_profile_shape("input_ids", index)
        fewest, _, most = engine.get_tensor_profile_shape("logits_index", index)
        self.batch, self.sequence = zip(low, high, strict=True)
        self.logits: tuple[int, int] = (fewest[1], most[1])
        self._context = context
        self._device = device
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        if not context.set_optimization_profile_async(index, device.stream):
            raise _refusal(f"profile {index}")
        device.synchronize()

    def takes(self, sequence: int, logits: int) -> bool:
        (low, high), (fewest, most) = self.sequence, self.logits
        return bool(low <= sequence <= high and fewest <= logits <= most)

    def run(
        self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], logits: tuple[int, ...]
    ) -> None:
        """Put one step on the stream; the engine must announce the shape `logits`."""
        if shapes != self._shapes:
            self._shapes = {}  # if one is refused, all are set anew
            for name, shape in shapes.items():
                if not self._context.set_input_shape(name, shape):
                    raise _refusal(f"shape {shape} of {name}")
            if unknown := self._context.infer_shapes():
                raise _refusal(f"the shapes of a step: {unknown} are not known to it")
            announced = tuple(self._context.get_tensor_shape("logits"))
            if announced != logits:
                raise _refusal(f"logits of shape {logits} and announces {announced}")
            self._shapes = shapes
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                if not self._context.set_tensor_address(name, address):
                    raise _refusal(f"the memory of {name}")
                self._addresses[name] = address
        if not self._context.execute_async_v3(self._device.stream):
            raise _refusal("a step")


class RtxEngine:
    """A loaded engine with one execution context for each profile; `RtxDecoder` gives it a cache.

    The file `runtime_cache` keeps the kernels that loading compiles. `cache_shape` is key-value
    heads, tokens, head size; `row_bytes` of one cache tensor; `contexts` have decode first.
    IncompatibleError if it is not for this card or this version of TensorRT-RTX; CorruptError if
    the file is damaged or no decoder engine of this pipeline.
    """

    def __init__(self, plan: Path, device: CudaDevice, runtime_cache: Path) -> None:
        import tensorrt_rtx as trt

        self.device = device
        # Each must outlive what was made from it.
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._deserialize(plan)
        self.caches, self.cache_shape, self.cache_dtype = cache_tensors(self._engine)
        self.context = self.cache_shape[1]
        self.vocab_size = int(self._engine.get_tensor_shape("logits")[-1])
        self._cache_file = runtime_cache
        self._config = self._runtime_config()
        self.contexts = [
            self._new_context(index) for index in range(self._engine.num_optimization_profiles)
        ]
        self.row_bytes = math.prod(self.cache_shape) * {"float32": 4}.get(self.cache_dtype, 2)
        self.max_batch = max(one.batch[1] for one in self.contexts if one.takes(1, 1))
        self.logits_per_step = max(min(one.sequence[1], one.logits[1]) for one in self.contexts)

    def context_for(self, sequence: int, logits: int) -> StepContext:
        for context in self.contexts:
            if context.takes(sequence, logits):
                return context
        profiles = "; ".join(
            f"{p.sequence[0]} to {p.sequence[1]} tokens, {p.logits[0]} to {p.logits[1]} logits"
            for p in self.contexts
        )
        message = f"got a step of {sequence} tokens and {logits} logits a row"
        raise RecipeError([Fault("", f"{message}; the engine's profiles take: {profiles}")])

    def save_runtime_cache(self) -> None:
        serialized = self._runtime_cache.serialize()
        if serialized is None:
            return
        self._cache_file.parent.mkdir(parents=True, exist_ok=True)
        # Its own name for each process: two that end at once must not mix their bytes.
        part = self._cache_file.with_name(f"{self._cache_file.name}.{os.getpid()}")
        part.write_bytes(memoryview(serialized))
        part.replace(self._cache_file)

    def _deserialize(self, plan: Path) -> Any:
        try:
            with plan.open("rb") as stream:
                content = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:  # a ValueError: the file is empty
            message = f"{plan} cannot be read: {error}; build or pull the package again"
            raise CorruptError(message) from error
        with contextlib.closing(content):
            engine = self._runtime.deserialize_cuda_engine(content)
            if engine is not None:
                return engine
            header = content[: self._runtime.engine_header_size]
        validity, diagnostics = self._runtime.get_engine_validity(header)
        raise IncompatibleError(
            f"TensorRT-RTX cannot load {plan} (validity {validity.name}, diagnostics "
            f"{diagnostics}); it wants the card's SM and the version that compiled it, or take "
            "runner=onnxruntime, its graph on a CPU"
        )

    def _runtime_config(self) -> Any:
        import tensorrt_rtx as trt

        config = self._engine.create_runtime_config()
        # The default gives every context the memory of the largest profile.
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        )
        # The default, lazy, compiles beside later steps, which shifts their times.
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        self._runtime_cache = config.create_runtime_cache()
        with contextlib.suppress(FileNotFoundError):
            # False where they are of another driver, card or version.
            if not self._runtime_cache.deserialize(self._cache_file.read_bytes()):
                print(f"{self._cache_file} does not fit here; not used", file=sys.stderr)
        if not config.set_runtime_cache(self._runtime_cache):
            raise _refusal("a runtime cache")
        return config

    def _new_context(self, index: int) -> StepContext:
        context = self._engine.create_execution_context(self._config)
        if context is None:
            raise PipelineError(
                f"TensorRT-RTX made no execution context for profile {index}; free the card's "
                "memory, or build with a smaller compiler.max_prefill_batch_size"
            )
        return StepContext(self._engine, index, context, self.device)


def cache_tensors(engine: Any) -> tuple[tuple[str, ...], tuple[int, int, int], str]:
    """Names, shape of a row and type of the cache tensors; as of `RtxEngine`.

    `get_aliased_input_tensor` names the input whose memory an output shares: for KVCacheUpdate by
    its docstring (1.7.1).
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    caches = tuple(name.removeprefix("past_") for name in names if name.startswith("past_"))
    apart = [n for n in caches if engine.get_aliased_input_tensor(f"present_{n}") != f"past_{n}"]
    if not caches or "logits" not in names or apart:
        fault = f"past and present of {apart} do not share memory" if apart else f"it has {names}"
        raise CorruptError(
            f"the engine's interface is not that of a decoder of this pipeline: {fault}; build it "
            "again with: enginesmith build RECIPE --rebuild"
        )
    heads, context, size = tuple(engine.get_tensor_shape(f"past_{caches[0]}"))[1:]
    dtype = _DTYPES[engine.get_tensor_dtype(f"past_{caches[0]}").name]
    return caches, (heads, context, size), dtype


def row_groups(batch: int, max_rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """Split rows into groups (start, end) of `max_rows` at most, each aligned in the cache."""
    if batch <= max_rows:
        return [(0, batch)]
    unit = ALIGNMENT_BYTES // math.gcd(ALIGNMENT_BYTES, row_bytes)
    rows = max_rows // unit * unit
    if rows == 0:
        got = f"got {batch} prompts at once; this engine takes {max_rows}"
        why = f"of its cache's rows only every {unit}th is aligned"
        message = f"{got}: {why}; make compiler.max_seq_len a multiple of 16"
        raise RecipeError([Fault("", message)])
    return [(start, min(start + rows, batch)) for start in range(0, batch, rows)]


class RtxDecoder:
    """A loaded engine with a zeroed cache for a fixed number of rows."""

    def __init__(self, engine: RtxEngine, batch: int) -> None:
        if not 1 <= batch <= engine.max_batch:
            message = f"got {batch} prompts; wanted 1 to {engine.max_batch}"
            raise RecipeError([Fault("", message)])
        self.batch, self.context = batch, engine.context
        self._engine, self._device = engine, engine.device
        self._buffers: dict[str, torch.Tensor] = {}
        count = batch * math.prod(engine.cache_shape)
        self._caches = {
            name: self._device.zeros(count, engine.cache_dtype) for name in engine.caches
        }

    def step(self, ids: Ids, write_indices: Ids, logits_index: Ids) -> NDArray[np.float32]:
        import numpy as np

        context = self._engine.context_for(ids.shape[1], logits_index.shape[1])
        groups = row_groups(self.batch, context.batch[1], self._engine.row_bytes)
        inputs = {"input_ids": ids, "write_indices": write_indices, "logits_index": logits_index}
        pieces = [
            self._run(context, start, {name: all_[start:end] for name, all_ in inputs.items()})
            for start, end in groups
        ]
        self._device.synchronize()
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _run(self, context: StepContext, start: int, inputs: dict[str, Ids]) -> NDArray[np.float32]:
        """Put one group of rows on the stream; its logits are there after `synchronize`."""
        engine = self._engine
        wanted = (*inputs["logits_index"].shape, engine.vocab_size)
        logits = self._buffer("logits", math.prod(wanted), "float32")
        shapes, addresses = {}, {"logits": logits.data_ptr()}
        for name, values in inputs.items():
            buffer = self._buffer(name, values.size, "int64")
            self._device.upload(values, buffer)
            shapes[name], addresses[name] = values.shape, buffer.data_ptr()
        for name, cache in self._caches.items():
            shapes[f"past_{name}"] = (wanted[0], *engine.cache_shape)
            address = cache.data_ptr() + start * engine.row_bytes
            addresses[f"past_{name}"] = addresses[f"present_{name}"] = address
        context.run(shapes, addresses, wanted)
        return self._device.download(logits, wanted)

    def _buffer(self, name: str, count: int, dtype: str) -> torch.Tensor:
        """Memory for one tensor of a step, which groups share: the stream keeps their order."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[name] = self._device.zeros(count, dtype)
        return buffer


def _refusal(what: str) -> PipelineError:
    return PipelineError(f"TensorRT-RTX refuses {what}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrtRtxRunner:
    """Runs a trtrtx engine in a process that ends with the session. Not run on a card yet.

    An engine holds its kernels as source; TensorRT-RTX compiles them on the card when it is loaded
    and, for shapes that it has not seen, before that step goes on, so that a warm-up takes all of
    it. This machine's cache keeps them; the library itself refuses those of another card, driver
    or version.

    Attributes:
        load_timeout_s: Longest time for loading, compilation included.
        answer_timeout_s: Longest time for one answer, or the next token of a stream.
    """

    name: ClassVar[str] = "tensorrt-rtx"
    device: ClassVar[Device] = "cuda"
    abilities: ClassVar[frozenset[Ability]] = BATCHES

    load_timeout_s: PositiveFloat
    answer_timeout_s: PositiveFloat

    def why_not(self, engine: Engine) -> str | None:
        if format_spec(engine.format).runner != "tensorrt_rtx":
            return f"runner=tensorrt_rtx does not run {engine.format} engines"
        if reason := _missing_package(engine.runtime[1]) or _wrong_card(engine.sms):
            return f"runner=tensorrt_rtx {reason}; or take runner=onnxruntime, its graph on a CPU"
        return None

    def open(self, engine: Engine) -> AbstractContextManager[ChildSession]:
        return open_child(self.program(engine.dir, engine.digest))

    def program(
        self, engine_dir: Path, digest: str, opener: str = f"{__name__}:open_plan"
    ) -> Program:
        """What the child loads; `digest` names the engine's runtime cache."""
        kernels = str(cache_root() / "rtx-kernels" / digest[:24])
        plan = str(engine_dir / PLAN_FILE)
        limits = {"load_s": self.load_timeout_s, "answer_s": self.answer_timeout_s}
        return session_program("TensorRT-RTX", opener, **limits, plan=plan, runtime_cache=kernels)


@contextlib.contextmanager
def open_plan(
    plan: str, runtime_cache: str, open_device: Callable[[], CudaDevice] = CudaDevice
) -> Iterator[DecoderSession]:
    """An engine in this process, as `RtxEngine`; its compiled kernels are kept at the end."""
    engine = RtxEngine(Path(plan), open_device(), Path(runtime_cache))
    sizes = {"context": engine.context, "logits_per_step": engine.logits_per_step}
    yield DecoderSession(lambda batch: RtxDecoder(engine, batch), **sizes)
    engine.save_runtime_cache()


def _missing_package(wanted: str) -> str | None:
    installed = installed_version(PACKAGE)
    if installed == wanted:
        return torch_fault()
    return (
        f"needs {PACKAGE} {wanted}, which compiled the engine; got {installed or 'none'}: "
        f"pip install {PACKAGE}=={wanted}"
    )


def _wrong_card(sms: tuple[int, ...]) -> str | None:
    card = read_conditions()
    wanted = " or ".join(str(sm) for sm in sms)
    if card is None:
        return f"needs a CUDA device of SM {wanted}, and {NO_CARD}"
    if card.sm not in sms:
        return (
            f"needs a CUDA device of SM {wanted}, which the engine was compiled for; {card.gpu} "
            f"has SM {card.sm}: build with its target"
        )
    return None


KIND = TrtRtxRunner
