"""The checkpoint in plain PyTorch: what every runtime should compute, up to rounding.

Loads the Transformers model of a unified checkpoint and replaces each quantized linear by one that
rounds its input as the precision says and multiplies with the dequantized codes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.model.hf import quiet, use_onednn
from pipeline.model.spec import LongRopeScaling, Rope, rope_frequencies
from pipeline.quant.unified import UnifiedCheckpoint, torch_view

if TYPE_CHECKING:
    import torch


def load_simulation(
    checkpoint_dir: Path, *, layers: tuple[int, ...] | None = None, context: int | None = None
) -> Any:
    """A Transformers model in float32 that simulates the checkpoint.

    Args:
        checkpoint_dir: Unified checkpoint.
        layers: Keep only these decoder layers, in this order; None for all.
        context: Of the simulated engine, tokens, which chooses LongRoPE's factors. None leaves the
            choice to Transformers, by the longest row.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    use_onednn()
    checkpoint = UnifiedCheckpoint(checkpoint_dir)
    config_json = dict(checkpoint.config_json)
    config_json.pop("quantization_config", None)
    kept = tuple(range(config_json["num_hidden_layers"])) if layers is None else layers
    config_json["num_hidden_layers"] = len(kept)
    windows = checkpoint.spec.windows
    if config_json.get("layer_types") or len(set(windows)) > 1:
        kinds = ["sliding_attention" if window else "full_attention" for window in windows]
        config_json["layer_types"] = [kinds[layer] for layer in kept]
    with quiet():
        config = AutoConfig.for_model(config_json.pop("model_type"), **config_json)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {
        _renumber(name, kept): _dequantize(checkpoint, name, stored)
        for name, stored in checkpoint.parameters.items()
        if _layer_of(name) in (-1, *kept)
    }
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"the model has no {unexpected}, the checkpoint no {missing}")
    model.tie_weights()
    round_input = checkpoint.precision.round_input
    for name in checkpoint.quantized_linears if round_input is not None else ():
        if _layer_of(name) in kept:
            hook = partial(_round, round_input, float(checkpoint.scalar(f"{name}.input_scale")))
            model.get_submodule(_renumber(name, kept)).register_forward_pre_hook(hook)
    if context is not None:
        _fix_longrope(model, checkpoint.spec.layers[0].attention.rope, context)
    return model.eval()


def reverse_sums(model: Any) -> Any:
    """The same model, its linears summing from the last input to the first from now on.

    The difference is the noise floor: rounding errors as two runtimes have.
    """
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # a tied embedding keeps its own weight
            module.weight = torch.nn.Parameter(module.weight.data.flip(-1), requires_grad=False)
            module.register_forward_pre_hook(lambda _, inputs: inputs[0].flip(-1))
    return model


def _round(round_input: Any, scale: float, _linear: Any, inputs: tuple[Any]) -> Any:
    return round_input(inputs[0], scale)


def _dequantize(checkpoint: UnifiedCheckpoint, name: str, stored: str) -> torch.Tensor:
    values, module = torch_view(checkpoint.read(stored)), name.removesuffix(".weight")
    if not checkpoint.is_quantized(module):
        return values.float()
    return checkpoint.precision.dequantize(values, checkpoint.weight_scale(module))


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
