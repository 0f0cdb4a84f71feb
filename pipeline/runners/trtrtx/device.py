"""Memory of the card and the order of work on it: all that a decoder needs beside TensorRT-RTX."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.core.errors import IncompatibleError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


class CudaDevice:
    """The first CUDA device of this process, by way of PyTorch.

    Work is done in the order in which it was asked for.

    The stream becomes PyTorch's current one, so that its allocations and copies and the engine's
    kernels are in one order. It is not the default stream, which TensorRT would synchronize with
    the whole device (docstring of `execute_async_v3`, 1.7.1).
    """

    def __init__(self) -> None:
        """Take the device.

        Raises:
            IncompatibleError: PyTorch sees none.
        """
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
        """Handle of the stream, for `IExecutionContext.execute_async_v3`."""
        return int(self._stream.cuda_stream)

    def zeros(self, count: int, dtype: str) -> torch.Tensor:
        """New memory for `count` elements; `dtype` in NumPy's words, `bfloat16` among them."""
        return self._torch.zeros(count, dtype=getattr(self._torch, dtype), device="cuda")

    def upload(self, values: NDArray[np.int64], target: torch.Tensor) -> None:
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
        """Wait until all that was asked for is done."""
        self._stream.synchronize()
