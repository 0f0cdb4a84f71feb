"""What a runner needs of this machine's card, asked without importing PyTorch."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

NO_CARD = (
    "NVML shows this process none; see nvidia-smi, CUDA_VISIBLE_DEVICES and that nvidia-ml-py is "
    "installed"
)


def torch_fault() -> str | None:
    """What is wrong with the PyTorch that is installed; None where it is built for CUDA."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "none"
    if torch != "none" and not torch.endswith("+cpu"):
        return None
    return (
        f"needs PyTorch built for CUDA, got {torch}: install one as "
        "https://pytorch.org/get-started says"
    )
