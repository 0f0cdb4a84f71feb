"""A deserialized TensorRT-RTX engine with one execution context for each profile.

Names and signatures are those of tensorrt_rtx 1.7.1. Written without a card to run it on: the API
was read from the installed package, and the calls were tried on a stand-in that refuses what the
package's documentation forbids.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import CorruptError, Fault, IncompatibleError, PipelineError, RecipeError
from pipeline.runners.trtrtx.device import CudaDevice
from pipeline.runners.trtrtx.signature import StepProfile, read_signature

KernelSpecialization = Literal["lazy", "eager", "none"]


class StepContext:
    """One execution context on one profile; remembers what is set, and sets only what changed."""

    def __init__(self, context: Any, profile: StepProfile, device: CudaDevice) -> None:
        self.profile = profile
        self._context = context
        self._device = device
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        if not context.set_optimization_profile_async(profile.index, device.stream):
            raise _refused(f"profile {profile.index}")
        device.synchronize()

    def run(
        self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], logits: tuple[int, ...]
    ) -> None:
        """Put one step on the stream.

        Args:
            shapes: Of every input.
            addresses: Of every input and output.
            logits: Shape that the engine must announce for its output.

        Raises:
            PipelineError: The engine refuses a shape, an address or the step.
        """
        if shapes != self._shapes:
            self._shapes = {}  # if one is refused, all are set anew
            for name, shape in shapes.items():
                if not self._context.set_input_shape(name, shape):
                    raise _refused(f"shape {shape} of {name} in profile {self.profile}")
            if unknown := self._context.infer_shapes():
                raise _refused(f"the shapes of a step: {unknown} are not known to it")
            announced = tuple(self._context.get_tensor_shape("logits"))
            if announced != logits:
                raise _refused(f"logits of shape {logits} and announces {announced}")
            self._shapes = shapes
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                if not self._context.set_tensor_address(name, address):
                    raise _refused(f"the memory of {name}")
                self._addresses[name] = address
        if not self._context.execute_async_v3(self._device.stream):
            raise _refused("a step")


class RtxEngine:
    """A loaded engine; `pipeline.runners.trtrtx.decoder` gives it a cache."""

    def __init__(
        self,
        plan: Path,
        device: CudaDevice,
        kernel_specialization: KernelSpecialization,
        runtime_cache: Path | None,
    ) -> None:
        """Load an engine and check its interface; its kernels come as source and are compiled.

        Args:
            plan: The serialized engine.
            device: Where it computes.
            kernel_specialization: As of `TrtRtxRunner`.
            runtime_cache: File that keeps compiled kernels for the next load; None for none.

        Raises:
            IncompatibleError: It is not for this card or this version of TensorRT-RTX.
            CorruptError: The file is damaged or no decoder engine of this pipeline.
            PipelineError: TensorRT-RTX refuses to make it ready.
        """
        import tensorrt_rtx as trt

        self.device = device
        # Each must outlive what was made from it.
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._deserialize(plan)
        self.signature = read_signature(self._engine)
        self._cache_file = runtime_cache
        self._runtime_cache: Any = None
        self._config = self._runtime_config(kernel_specialization)
        self._contexts = [self._new_context(profile) for profile in self.signature.profiles]

    def context_for(self, sequence: int, logits: int) -> StepContext:
        """The context of the first profile that computes such a step; decode comes first.

        Raises:
            RecipeError: None does.
        """
        for context in self._contexts:
            if context.profile.takes(sequence, logits):
                return context
        profiles = "; ".join(
            f"{p.sequence[0]} to {p.sequence[1]} tokens, {p.logits[0]} to {p.logits[1]} logits"
            for p in self.signature.profiles
        )
        message = f"got a step of {sequence} tokens and {logits} logits a row"
        raise RecipeError([Fault("", f"{message}; the engine's profiles take: {profiles}")])

    def save_runtime_cache(self) -> None:
        """Keep the kernels that were compiled, for the next load."""
        if self._runtime_cache is None or self._cache_file is None:
            return
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
            raise CorruptError(
                f"{plan} cannot be read: {error}; build or pull the package again"
            ) from error
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

    def _runtime_config(self, kernel_specialization: KernelSpecialization) -> Any:
        import tensorrt_rtx as trt

        config = self._engine.create_runtime_config()
        # The default gives every context the memory of the largest profile.
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        )
        config.dynamic_shapes_kernel_specialization_strategy = getattr(
            trt.DynamicShapesKernelSpecializationStrategy, kernel_specialization.upper()
        )
        if self._cache_file is not None:
            self._runtime_cache = config.create_runtime_cache()
            with contextlib.suppress(FileNotFoundError):
                # False where they are of another driver, card or version.
                if not self._runtime_cache.deserialize(self._cache_file.read_bytes()):
                    print(f"{self._cache_file} does not fit here; not used", file=sys.stderr)
            if not config.set_runtime_cache(self._runtime_cache):
                raise _refused("a runtime cache")
        return config

    def _new_context(self, profile: StepProfile) -> StepContext:
        context = self._engine.create_execution_context(self._config)
        if context is None:
            raise PipelineError(
                f"TensorRT-RTX made no execution context for profile {profile.index}; its memory "
                "may not fit the card: free it, or build with a smaller "
                "compiler.max_prefill_batch_size"
            )
        return StepContext(context, profile, self.device)


def _refused(what: str) -> PipelineError:
    return PipelineError(f"TensorRT-RTX refuses {what}")
