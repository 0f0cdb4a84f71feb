"""Calibration: where it runs, which ranges it may see, and the scales that follow from them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.core.errors import CorruptError, IncompatibleError
from pipeline.model.spec import ModelSpec
from pipeline.quant.spec import FP8_E4M3_MAX

if TYPE_CHECKING:
    import torch

OUTLIER_FACTOR = 50.0
"""An activation amax this many times the median of its kind is named in the record: SmolLM2's
three massive activations lie at 25 to 180 times theirs (measured 2026-11-24)."""
_LIVE_ACTIVATION_WIDTHS = 8
"""Tensors alive at once in one layer: residual, norm, gate, up, their product, quantized copies."""

DeviceChoice = Literal["auto", "cuda", "layerwise", "cpu"]


@dataclass(frozen=True)
class Placement:
    """Where to calibrate (`layerwise`: weights streamed through the GPU), and why, with numbers."""

    kind: Literal["cuda", "layerwise", "cpu"]
    reason: str


def activation_bytes(shape: ModelSpec, tokens: int) -> int:
    """Estimate of the bfloat16 activations of one forward pass over `tokens` tokens."""
    widest = max(shape.layers[0].linear("gate").rows, shape.hidden_size)
    return 2 * _LIVE_ACTIVATION_WIDTHS * tokens * widest


def choose_placement(
    choice: DeviceChoice, shape: ModelSpec, *, batch_tokens: int, free_vram_bytes: int | None
) -> Placement:
    """On the GPU if it fits, else layer by layer, else on the CPU; `batch_tokens` of one pass.

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
    """float32 on a CPU, unless only bfloat16 fits its memory, which is several times slower there.

    4 bytes a weight, 1.2 for the export, 3.2 GB for libraries (see `pipeline.plan.sizes`).
    """
    needed = 5.2 * shape.params + 3.2e9
    return "float32" if needed <= available_bytes else "bfloat16"


def free_vram_bytes() -> int | None:
    """Free memory of the current CUDA device, or None."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


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


def check_amax(amax: Mapping[str, float]) -> list[str]:
    """Refuse amax values that cannot be scales; name the outliers among the activations.

    Raises:
        CorruptError: NaN, infinite, zero or negative: the quantizers are named.
    """
    if broken := {name: value for name, value in amax.items() if not 0 < value < math.inf}:
        listed = ", ".join(f"{name} = {value}" for name, value in sorted(broken.items())[:8])
        raise CorruptError(
            f"calibration saw no usable range for {len(broken)} quantizers: {listed}; check the "
            "weights and the calibration text, or list the layers under quantizer.keep_16bit"
        )
    outliers = []
    by_kind: dict[str, list[float]] = {}
    for name, value in amax.items():
        by_kind.setdefault(_kind(name), []).append(value)
    for name, value in sorted(amax.items()):
        values = sorted(by_kind[_kind(name)])
        median = values[len(values) // 2]
        if "input" in name and value > OUTLIER_FACTOR * median:
            outliers.append(f"{name}: amax {value:.3g} is {value / median:.0f} x the median")
    return outliers


def _kind(name: str) -> str:
    """Layer numbers removed, so that like is compared with like."""
    return re.sub(r"\.\d+(?=\.)", "", name)


def cache_scales(amax: Mapping[str, float]) -> dict[str, float]:
    """Scales of the KV cache, amax / 448, by the tensor names that readers look for.

    The names are those of k_proj and v_proj, also where a model fuses both into `qkv_proj`
    (ModelOpt's unified checkpoint, 0.37 and 0.47).
    """
    pattern = re.compile(r"(.*)\.([kv])_bmm_quantizer")
    found = {match: value for name, value in amax.items() if (match := pattern.fullmatch(name))}
    return {f"{m[1]}.{m[2]}_proj.{m[2]}_scale": value / FP8_E4M3_MAX for m, value in found.items()}


def bf16_scale(amax: Any, code_max: float) -> Any:
    """The smallest bfloat16 scale whose largest code, `code_max`, reaches `amax`."""
    import torch

    # In float64: a GPU's float32 division can land a last bit above an exact quotient.
    scale = amax.double() / code_max
    rounded = scale.to(torch.bfloat16)
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.double() >= scale, rounded, above)


def share_scales(model: Any, spec: ModelSpec, code_max: float) -> dict[str, tuple[str, ...]]:
    """Give each fused group one weight amax, and every amax a bfloat16-exact scale, in place.

    Runtimes fuse q/k/v and gate/up, and requantize parts whose scale differs: 12 to 35 % more error
    than one rounding with the shared scale, which costs nothing (SmolLM2, measured 2026-11-24).
    TensorRT-LLM casts scales to 16 bits: one that is exact in bfloat16 is the same everywhere.

    Returns the groups that share. The model is calibrated, its weights are not yet rounded.
    """
    import torch

    quantized = {
        name: module
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight_quantizer", None), "is_enabled", False)
    }
    fused = spec.fused_modules()
    groups = {label: names for label, names in fused.items() if quantized.keys() >= set(names)}
    for names in groups.values():
        shared = torch.stack([quantized[name].weight_quantizer.amax for name in names]).max()
        for name in names:
            _set_amax(quantized[name].weight_quantizer, shared)
    for module in quantized.values():
        for quantizer in (module.weight_quantizer, module.input_quantizer):
            if quantizer.is_enabled:
                scale = bf16_scale(quantizer.amax, code_max)
                _set_amax(quantizer, scale.float() * code_max)
    return groups


def _set_amax(quantizer: Any, value: Any) -> None:
    """Replace an amax: the setter alone would copy into a bfloat16 model's bfloat16 buffer."""
    if hasattr(quantizer, "_amax"):
        delattr(quantizer, "_amax")
    quantizer.amax = value.float().clone()
