"""Which PyTorch is installed, told without importing it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def torch_without_cuda() -> str | None:
    """The version of a PyTorch that has no CUDA, or `none`; None when it has."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        return "none"
    return torch if torch.endswith("+cpu") else None
