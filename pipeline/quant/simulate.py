"""The checkpoint in plain PyTorch: what every runtime should compute, up to rounding.

Loads the Transformers model of a unified checkpoint and replaces each quantized linear by one that
rounds its input as the precision says and multiplies with the dequantized codes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.model.hf import quiet, use_onednn
from pipeline.model.spec import LongRopeScaling, Rope, rope_frequencies
from pipeline.quant.unified import UnifiedCheckpoint, torch_view

if TYPE_CHECKING:
    import torch


def load_simulation(
    checkpoint_dir: Path,
    *,
    layers: tuple[int, ...] | None = None,
    reverse: bool = False,
    context: int | None = None,
) -> Any:
    """A Transformers model in float32 that simulates the checkpoint.

    Args:
        checkpoint_dir: Unified checkpoint.
        layers: Keep only these decoder layers, in this order; None for all.
        reverse: Linears sum from the last input to the first. The difference is the noise floor:
            rounding errors as two runtimes have.
        context: Of the simulated engine, tokens, which chooses LongRoPE's factors. None leaves the
            choice to Transformers, by the longest row.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    use_onednn()
    checkpoint = UnifiedCheckpoint(checkpoint_dir)
    config_json = dict(checkpoint.config_json)
    config_json.pop("quantization_config", None)
    kept = tuple(range(config_json["num_hidden_layers"])) if layers is None else layers
    config_json["num_hidden_layers"] = len(kept)
    if config_json.get("layer_types"):
        config_json["layer_types"] = [config_json["layer_types"][layer] for layer in kept]
    with quiet():
        config = AutoConfig.for_model(config_json.pop("model_type"), **config_json)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.to_empty(device="cpu")
    _restore_buffers(model)
    state = {
        _renumber(name, kept): _dequantize(checkpoint, name)
        for name in checkpoint.tensors
        if not name.endswith("_scale") and _layer_of(name) in (-1, *kept)
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"the model has no {unexpected}, the checkpoint no {missing}")
    model.tie_weights()
    round_input, scales = checkpoint.precision.round_input, dict[str, float]()
    for name in checkpoint.quantized_linears if round_input is not None else ():
        if _layer_of(name) in kept:
            scales[_renumber(name, kept)] = float(checkpoint.scalar(f"{name}.input_scale"))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (name in scales or reverse):
            _wrap(module, round_input, scales.get(name), reverse=reverse)
    if context is not None:
        _fix_longrope(model, checkpoint.spec.rope, context)
    return model.eval()


def _wrap(
    linear: Any,
    round_input: Callable[[torch.Tensor, float], torch.Tensor] | None,
    scale: float | None,
    *,
    reverse: bool,
) -> None:
    """Let a linear round its input before it multiplies, and sum in that order."""
    import torch

    if reverse:  # a tied embedding keeps its own
        linear.weight = torch.nn.Parameter(linear.weight.data.flip(-1), requires_grad=False)

    def forward(x: torch.Tensor) -> torch.Tensor:
        rounded = x if round_input is None or scale is None else round_input(x, scale)
        summed = rounded.flip(-1) if reverse else rounded
        return torch.nn.functional.linear(summed, linear.weight, linear.bias)

    linear.forward = forward


def _dequantize(checkpoint: UnifiedCheckpoint, name: str) -> torch.Tensor:
    stored = torch_view(checkpoint.read(name))
    if not checkpoint.is_quantized(name.removesuffix(".weight")):
        return stored.float()
    return checkpoint.precision.dequantize(stored, float(checkpoint.scalar(f"{name}_scale")))


def _restore_buffers(model: Any) -> None:
    """Recompute what is no weight (the rotary frequencies), which the meta device lost."""
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(config=module.config, device="cpu")
            module.inv_freq = fresh.inv_freq
            module.original_inv_freq = fresh.original_inv_freq


def _fix_longrope(model: Any, rope: Rope, context: int) -> None:
    """Let LongRoPE use the factors of `context`, whatever the length of a row."""
    import torch

    if not isinstance(rope.scaling, LongRopeScaling):
        return
    frequencies = torch.from_numpy(rope_frequencies(rope, context=context)).float()
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq = frequencies
            # Transformers updates the frequencies of a module that says `longrope`.
            module.rope_type = "default"


def _layer_of(name: str) -> int:
    """Layer number in a module or tensor name; -1 outside the layers."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1


def _renumber(name: str, kept: tuple[int, ...]) -> str:
    """The name with its layer's position among the kept ones."""
    layer = _layer_of(name)
    return name.replace(f"layers.{layer}.", f"layers.{kept.index(layer)}.") if layer >= 0 else name
