"""Where calibration runs: on the GPU if it fits, else layer by layer, else on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.core.errors import IncompatibleError
from pipeline.model.spec import ModelSpec

if TYPE_CHECKING:
    import torch

DeviceChoice = Literal["auto", "cuda", "layerwise", "cpu"]

_LIVE_ACTIVATION_WIDTHS = 8
"""Tensors of the MLP's or hidden width alive at once in one layer: residual, norm, gate, up, their
product, and quantized copies."""


@dataclass(frozen=True)
class Placement:
    """The decision.

    Attributes:
        kind: `cuda` (whole model), `layerwise` (weights streamed through the GPU) or `cpu`.
        reason: Why, with the numbers.
    """

    kind: Literal["cuda", "layerwise", "cpu"]
    reason: str


def activation_bytes(shape: ModelSpec, tokens: int) -> int:
    """Estimate of the bfloat16 activations of one forward pass over `tokens` tokens."""
    widest = max(shape.layers[0].linear("gate").rows, shape.hidden_size)
    return 2 * _LIVE_ACTIVATION_WIDTHS * tokens * widest


def choose_placement(
    choice: DeviceChoice, shape: ModelSpec, *, batch_tokens: int, free_vram_bytes: int | None
) -> Placement:
    """Decide where calibration runs; pure.

    Args:
        choice: What the recipe asks for.
        shape: The model.
        batch_tokens: Tokens of one forward pass.
        free_vram_bytes: Free device memory, or None without a usable GPU.

    Raises:
        IncompatibleError: The recipe insists on a GPU and there is none, or too little memory.
    """
    if choice == "cpu":
        return Placement("cpu", "the recipe says so")
    if free_vram_bytes is None:
        if choice != "auto":
            raise IncompatibleError(
                f"quantizer.device={choice}, but torch sees no CUDA device; use "
                "quantizer.device=auto or a machine with a GPU"
            )
        return Placement("cpu", "torch sees no CUDA device")
    activations = activation_bytes(shape, batch_tokens)
    whole = 2 * shape.params + activations  # bfloat16 on a GPU
    layer = 2 * shape.linear_params // shape.num_layers + 4 * shape.embedding_params
    by_layer = layer + activations
    free = f"{free_vram_bytes / 1e9:.1f} GB of device memory are free"
    if choice in ("auto", "cuda") and whole <= free_vram_bytes:
        return Placement("cuda", f"{free}, {whole / 1e9:.1f} GB are needed")
    if choice in ("auto", "layerwise") and by_layer <= free_vram_bytes:
        return Placement("layerwise", f"{free}, the whole model needs {whole / 1e9:.1f} GB")
    if choice == "auto":
        return Placement("cpu", f"{free}, even one layer needs {by_layer / 1e9:.1f} GB")
    raise IncompatibleError(
        f"quantizer.device={choice}: {free}, {(whole if choice == 'cuda' else by_layer) / 1e9:.1f} "
        "GB are needed; use quantizer.device=auto or a smaller calibration batch"
    )


def cpu_dtype(shape: ModelSpec, available_bytes: int) -> Literal["float32", "bfloat16"]:
    """float32 on a CPU, unless only bfloat16 fits its memory.

    float32 takes 4 bytes a weight, 1.2 for the export beside it, and 3.2 GB for libraries and
    activations (see `pipeline.plan.sizes`); bfloat16 multiplies several times slower there.
    """
    needed = 5.2 * shape.params + 3.2e9
    return "float32" if needed <= available_bytes else "bfloat16"


def free_vram_bytes() -> int | None:
    """Free memory of the current CUDA device, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, _total = torch.cuda.mem_get_info()
    return int(free)


def place(model: Any, placement: Placement) -> torch.device:
    """Move the model, or hook it for layer-by-layer execution; returns the device of its inputs."""
    import torch

    if placement.kind == "cuda":
        model.to("cuda")
    elif placement.kind == "layerwise":
        from accelerate import dispatch_model

        # Not accelerate's cpu_offload: ModelOpt knows only the loader that dispatch_model uses.
        base = model.base_model
        layers = {f"{model.base_model_prefix}.layers.{n}": "cpu" for n in range(len(base.layers))}
        others = [f"{model.base_model_prefix}.{name}" for name, _ in base.named_children()]
        rest = {name: 0 for name in (*others, "lm_head") if not name.endswith(".layers")}
        dispatch_model(model, device_map={**rest, **layers}, main_device=0)
    return torch.device("cpu" if placement.kind == "cpu" else "cuda")
