"""W4A16: INT4 weights, groups of columns sharing a bfloat16 scale; activations stay in 16 bits.

AWQ (arXiv 2306.00978) multiplies the columns of a linear, and divides its input, so that the
columns which see large inputs are rounded least. ModelOpt searches the factors. They are folded
here into whatever makes the input, before anything is rounded: those of q/k/v and of gate/up into
the norm before them, those of down into the rows of up. So no format carries them, all hold the
same codes, and every one is checked against one source. o_proj has none: under grouped-query
attention several columns of it are made by one row of v.

Stored as compressed-tensors' `pack-quantized`, which vLLM loads: `weight_packed` int32 [rows,
columns / 8], eight codes from the lowest bits up, each plus 8; `weight_scale` [rows, groups];
`weight_shape`. Sources: `compressors/pack_quantized.py` (0aa127b4) of compressed-tensors;
`schemes/compressed_tensors_wNa16.py` (519b90d4) and `compressed_tensors.py` (be696453) of vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.safetensors_files import INDEX
from pipeline.model.spec import layer_name
from pipeline.quant.calibration import bf16_scale
from pipeline.quant.modelopt import (
    Calibrated,
    Factors,
    ModelOptQuantizer,
    Written,
    with_cache_scales,
    write_config,
)
from pipeline.quant.spec import OnnxPattern, OnnxWriter, QuantSpec
from pipeline.quant.unified import torch_view

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

CODE_MAX = 7.0
"""Symmetric: the code -8 is not used."""
_OFFSET = 8
_NORMS = {"qkv": "attention_in", "gate_up": "mlp_in"}
"""Fused group -> role of the norm that makes its input, where a layer has one."""


def round_to_int4(weights: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, columns] int8 within +-7, and scales [rows, columns / group] bfloat16.

    The scale is rounded first, upwards, and the weights with it: no code saturates.
    """
    import torch

    grouped = weights.float().reshape(len(weights), -1, group)
    amax = grouped.abs().amax(-1)
    scale = bf16_scale(torch.where(amax > 0, amax, CODE_MAX), CODE_MAX)
    return (grouped / scale.float()[..., None]).round_().flatten(1).to(torch.int8), scale


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes [rows, columns] int8 -> [rows, columns / 8] int32."""
    import torch

    low, high = (codes + _OFFSET).to(torch.uint8).reshape(len(codes), -1, 2).unbind(-1)
    return (low | high << 4).contiguous().view(torch.int32)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The codes that were packed."""
    import torch

    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(1).to(torch.int8) - _OFFSET


def dequantize(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Weights [rows, columns] float32."""
    codes = unpack(packed).float().reshape(*scale.shape, -1)
    return (codes * scale.float()[..., None]).flatten(1)


def modelopt_config(kept: Sequence[str], group: int | None) -> dict[str, Any]:
    """ModelOpt's AWQ search with KV-cache scales, less the kept linears, and o_proj."""
    import modelopt.torch.quantization as mtq

    unsearched = [f"{name}.weight_quantizer" for name in (*sorted(kept), "*.o_proj")]
    blocks = {-1: group, "type": "static"}
    return with_cache_scales(mtq.INT4_AWQ_CFG, disabled=unsearched, block_sizes=blocks)


def fold(calibrated: Calibrated) -> dict[str, Factors]:
    """Source tensor -> its factors: those of the inputs, and their inverse in what makes them."""
    import torch

    spec, source = calibrated.source.spec, calibrated.source
    factors: dict[str, Factors] = {f"{module}.weight": Factors() for module in spec.modules}
    for number, layer in enumerate(spec.layers):
        name = layer_name(number)
        for fused, role in _NORMS.items():
            modules = {f"{name}.{linear.module}" for linear in layer.group(fused)}
            norm = layer.norm(role)
            if norm is not None and modules.isdisjoint(calibrated.kept_16bit):
                weight, offset = f"{name}.{norm.module}.weight", spec.norm_offset
                folded = Factors(rows=1 / _searched(calibrated, modules), offset=offset)
                gain = torch_view(source.read(weight)).float() + offset
                # The norm is stored in bfloat16: the columns take what its rounding left.
                stored = folded.of(gain - offset).to(torch.bfloat16).float() + offset
                columns = torch.where(stored != 0, gain / stored, 1.0)
                factors[weight] = Factors(rows=1 / columns, offset=offset)
                for module in modules:
                    factors[f"{module}.weight"].columns = columns
        up, down = layer.linear("up"), f"{name}.{layer.linear('down').module}"
        if down not in calibrated.kept_16bit:
            columns = _searched(calibrated, {down})
            rows = torch.ones(layer.modules[up.module][0])
            rows[up.first_row : up.first_row + up.rows] = 1 / columns
            factors[f"{name}.{up.module}.weight"].rows = rows
            factors[f"{name}.{up.module}.bias"] = Factors(rows=rows)
            factors[f"{down}.weight"].columns = columns
    return factors


def _searched(calibrated: Calibrated, modules: set[str]) -> torch.Tensor:
    """ModelOpt's factors of the columns of linears with one input: their geometric mean."""
    import torch

    found = [calibrated.model.get_submodule(module) for module in sorted(modules)]
    inverse = torch.stack([one.input_quantizer.pre_quant_scale.float().cpu() for one in found])
    return 1 / inverse.log().mean(0).exp().reshape(-1)


def write(calibrated: Calibrated, out_dir: Path) -> Written:
    """Fold, round, pack: shards as the source has them, the cache's scales in the last."""
    import torch
    from safetensors.torch import save_file

    source, spec = calibrated.source, calibrated.source.spec
    group = calibrated.precision.group_size(spec)
    if group is None:  # `quantizer_faults` says so
        raise ValueError(f"no group of columns divides the linears of {spec.architecture}")
    factors = fold(calibrated)
    quantized = {f"{name}.weight" for name in spec.modules if name not in calibrated.kept_16bit}
    named = [name for name in source.tensors if not (spec.tied and name == "lm_head.weight")]
    files = [(file, list(names)) for file, names in groupby(named, lambda n: source.entry(n).file)]
    index: dict[str, str] = {}
    for file, names in files:
        made: dict[str, torch.Tensor] = {}
        for name in names:
            values = factors.get(name, Factors()).of(torch_view(source.read(name)))
            if name in quantized:
                made |= _stored(name, values, group)
            else:
                made[name] = values.to(torch.bfloat16)
        if file == files[-1][0]:
            made |= {name: torch.tensor(one) for name, one in calibrated.cache_scales.items()}
        save_file(made, out_dir / file.name, metadata={"format": "pt"})
        index |= dict.fromkeys(made, file.name)
    if len(files) > 1:
        (out_dir / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2))
    write_config(source.dir, out_dir, declaration(group, sorted(calibrated.kept_16bit)))
    return Written(record={"group_size": group}, factors=factors)


def _stored(name: str, values: torch.Tensor, group: int) -> dict[str, torch.Tensor]:
    import torch

    codes, scale = round_to_int4(values, group)
    shape = torch.tensor(values.shape)
    return {f"{name}_packed": pack(codes), f"{name}_scale": scale, f"{name}_shape": shape}


def declaration(group: int, kept_16bit: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors.

    The embedding is not among the ignored: vLLM would give it the method of a linear.
    """
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
    scheme = {
        "targets": ["Linear"],
        "weights": {**weights, "strategy": "group", "group_size": group, "actorder": None},
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head", *kept_16bit],
        "kv_cache_scheme": None,
    }


def _onnx_codes(packed: NDArray[Any]) -> NDArray[Any]:
    """Pairs of codes in two's complement, as ONNX's INT4 has them, of pairs that are plus 8."""
    import numpy as np

    pairs: NDArray[Any] = packed.view(np.uint8) ^ np.uint8(_OFFSET << 4 | _OFFSET)
    return pairs


def _weight_nodes(w: OnnxWriter, codes: str, scale: str, group: int) -> str:
    """The scale has the activations' type, which TensorRT-RTX 1.7.1 demands (2026-11-30)."""
    return w.op("DequantizeLinear", [codes, scale], f"{codes}.dq", axis=1, block_size=group)


SPEC = QuantSpec(
    name="w4a16",
    title="W4A16",
    weight_dtype="int32",
    weight_name="weight_packed",
    packed=8,
    group_sizes=(128, 64, 32),
    scales=("weight_scale", "weight_shape"),
    code_max=CODE_MAX,
    absolute_step=0.5,
    # Half a step of the largest of 128 normally distributed weights: 17 % lie below.
    max_lost_share=0.5,
    quant_algo="W4A16_AWQ",
    declared="compressed-tensors (pack-quantized)",
    operands="fp16",
    native_sm=80,
    dequantize=dequantize,
    modelopt_config=modelopt_config,
    onnx=OnnxPattern(weight=_weight_nodes, input=None, operands="int4", codes=_onnx_codes),
)


class W4a16Quantizer(ModelOptQuantizer):
    """INT4 weights by AWQ."""

    precision = SPEC.name

    def write(self, calibrated: Calibrated, out_dir: Path) -> Written:
        return write(calibrated, out_dir)


KIND = W4a16Quantizer
