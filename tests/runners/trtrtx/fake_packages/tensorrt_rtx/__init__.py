"""Stands in for TensorRT-RTX where no card is: an engine runs its ONNX twin on the CPU.

Every class and method here is one of tensorrt_rtx 1.7.1, which test_decoder.py compares; what its
documentation forbids is refused. A stream is a queue: what is put on it happens when it is
synchronized, so that a caller who does not wait reads nothing.

A plan is JSON: `graph` (a file), `cache` (name of its DataType), `profiles` (input name ->
smallest, best and largest shape), and `faults` (attribute -> what the engine says instead).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np

DataType = Enum("DataType", ["FLOAT", "HALF", "BF16", "INT32", "INT64"])
ExecutionContextAllocationStrategy = Enum(
    "ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"]
)
DynamicShapesKernelSpecializationStrategy = Enum(
    "DynamicShapesKernelSpecializationStrategy", ["LAZY", "EAGER", "NONE"]
)

_streams: dict[int, list[Callable[[], None]]] = {}
"""Handle -> what is to be done."""
_memory: dict[int, int] = {}
"""Address -> size in bytes of all that is allocated."""
_MAGIC = b"fake kernels "


def _refuse(message: str) -> bool:
    print(f"[TRT] [E] {message}", flush=True)
    return False


class Logger:
    WARNING = 2

    def __init__(self, min_severity: int) -> None: ...


class Runtime:
    def __init__(self, logger: Logger) -> None: ...

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine:
        return ICudaEngine(json.loads(bytes(memoryview(serialized_engine))))


class IRuntimeCache:
    def __init__(self) -> None:
        self._kernels: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(_MAGIC):
            return False
        self._kernels = set(json.loads(blob.removeprefix(_MAGIC)))
        return True

    def serialize(self) -> bytes:
        return _MAGIC + json.dumps(sorted(self._kernels)).encode()


class IRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def __init__(self) -> None:
        self._cache = IRuntimeCache()
        self._strategy = ExecutionContextAllocationStrategy.STATIC

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self._strategy = strategy


class ICudaEngine:
    def __init__(self, plan: dict[str, Any]) -> None:
        import onnxruntime

        self._plan = plan
        self._active: dict[int, IExecutionContext] = {}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(
            plan["graph"], options, providers=["CPUExecutionProvider"]
        )
        self._inputs = {x.name: x for x in self._session.get_inputs()}
        outputs = {x.name: x for x in self._session.get_outputs()}
        without = plan["faults"].get("without")
        self._tensors = {n: x for n, x in {**self._inputs, **outputs}.items() if n != without}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._plan["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return str(list(self._tensors)[index])

    def get_tensor_dtype(self, name: str) -> DataType:
        if name.startswith(("past_", "present_")):
            return DataType[self._plan["cache"]]
        return DataType.FLOAT if name == "logits" else DataType.INT64

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(x if isinstance(x, int) else -1 for x in self._tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._plan["profiles"][profile_index][name]]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        if "alias" in self._plan["faults"] or not name.startswith("present_"):
            return None
        return name.replace("present_", "past_")

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext:
        return IExecutionContext(self, runtime_config)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        self._engine = engine
        self._config = config
        self._profile = -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        if 0 not in engine._active:
            engine._active[0] = self
            self._profile = 0

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        active = self._engine._active
        if active.get(profile_index, self) is not self:
            return _refuse(f"profile {profile_index} is in use by another context")
        active.pop(self._profile, None)
        active[profile_index] = self
        self._profile, self._shapes = profile_index, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        bounds = self._engine._plan["profiles"][self._profile].get(name)
        if name not in self._engine._inputs or bounds is None:
            return _refuse(f"{name} is no input")
        low, _, high = bounds
        inside = len(shape) == len(low) and all(
            least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
        )
        if not inside:
            return _refuse(f"{name}: {shape} is not within {low} to {high}")
        self._shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        if name == "logits":
            vocab = self._engine.get_tensor_shape("logits")[-1]
            return (*self._shapes["logits_index"], vocab)
        return self._shapes[name.replace("present_", "past_")]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors:
            return _refuse(f"{name} is no input or output")
        if memory % 256:
            return _refuse(f"{name}: {memory:#x} is not aligned")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if missing := [n for n in self._engine._tensors if n not in self._addresses]:
            return _refuse(f"no address is set for {missing}")
        if missing := self.infer_shapes():
            return _refuse(f"no shape is set for {missing}")
        if stream_handle not in _streams:
            return _refuse("the default stream, or none")
        self._config._cache._kernels.add(str(self._shapes["input_ids"]))
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        _streams[stream_handle].append(lambda: self._execute(shapes, addresses))
        return True

    def _execute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine = self._engine
        feeds = {n: _load(addresses[n], s, engine.get_tensor_dtype(n)) for n, s in shapes.items()}
        names = [x.name for x in engine._session.get_outputs()]
        for name, values in zip(names, engine._session.run(names, feeds), strict=True):
            _store(addresses[name], values, engine.get_tensor_dtype(name))


def _load(address: int, shape: tuple[int, ...], dtype: DataType) -> Any:
    """A copy of what lies at an address, 16-bit types as float32."""
    values = _view(address, shape, dtype)
    return np.array(values, np.int64 if dtype == DataType.INT64 else np.float32)


def _store(address: int, values: Any, dtype: DataType) -> None:
    _view(address, values.shape, dtype)[:] = values


def _view(address: int, shape: tuple[int, ...], dtype: DataType) -> Any:
    """Memory of an address, which must be allocated as far as the shape reaches."""
    import ml_dtypes

    element: Any = {
        DataType.FLOAT: np.float32,
        DataType.HALF: np.float16,
        DataType.BF16: ml_dtypes.bfloat16,
        DataType.INT64: np.int64,
    }[dtype]
    size = int(np.prod(shape)) * np.dtype(element).itemsize
    if not any(start <= address and address + size <= start + n for start, n in _memory.items()):
        raise RuntimeError(f"illegal memory access: {size} bytes at {address:#x}")
    content = (ctypes.c_char * size).from_address(address)
    return np.frombuffer(content, element).reshape(shape)


class HostDevice:
    """`pipeline.runners.tensorrt_rtx.CudaDevice` in this process's memory; no part of the API.

    Its copies are queued with the engine's steps, in one order.
    """

    def __init__(self) -> None:
        self.stream = 0x1000 + len(_streams)
        _streams[self.stream] = []

    def zeros(self, count: int, dtype: str) -> _Buffer:
        import ml_dtypes

        return _Buffer(count, ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))

    def upload(self, values: Any, target: _Buffer) -> None:
        taken = values.reshape(-1).copy()

        def copy() -> None:
            target.values[: taken.size] = taken

        _streams[self.stream].append(copy)

    def download(self, source: _Buffer, shape: tuple[int, ...]) -> Any:
        host = np.full(shape, -12345.0, np.float32)

        def copy() -> None:
            host.reshape(-1)[:] = source.values[: host.size]

        _streams[self.stream].append(copy)
        return host

    def synchronize(self) -> None:
        work, _streams[self.stream] = _streams[self.stream], []
        for task in work:
            task()


class _Buffer:
    def __init__(self, count: int, dtype: Any) -> None:
        size = count * np.dtype(dtype).itemsize
        self._whole = np.zeros(size + 256, np.uint8)
        start = -self._whole.ctypes.data % 256
        self.values = self._whole[start : start + size].view(dtype)
        self._address = int(self.values.ctypes.data)
        _memory[self._address] = size

    def numel(self) -> int:
        return int(self.values.size)

    def data_ptr(self) -> int:
        return self._address

    def __del__(self) -> None:
        with contextlib.suppress(KeyError):
            del _memory[self._address]
