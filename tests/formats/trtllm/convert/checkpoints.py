"""Tiny checkpoints of every architecture, quantized by the real ModelOpt; edits of their files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.cache import StageCache
from pipeline.formats.trtllm.convert import convert_trtllm
from pipeline.formats.trtllm.layout import Dtype
from tests.architectures import tiny_architecture
from tests.quant.tiny_quantized import architecture_checkpoint


@dataclass(frozen=True)
class Converted:
    """A unified checkpoint and what became of it."""

    unified: Path
    dir: Path
    record: dict[str, Any]


def unified_checkpoint(root: Path, name: str, *keep_16bit: str, **overrides: Any) -> Path:
    """An FP8 checkpoint of `tiny_architecture(name)` as our own quantizer writes it."""
    return architecture_checkpoint(root, name, *keep_16bit, **overrides).dir


def modelopt_checkpoint(root: Path, name: str, *, kv_scales: bool, **overrides: Any) -> Path:
    """What ModelOpt's `export_hf_checkpoint` writes by itself: scales differ in a fused group."""
    import copy

    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    from pipeline.model.hf import load_model, quiet

    model = load_model(tiny_architecture(name, root / "model", **overrides), "float32")
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    if kv_scales:
        rules = copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
        if isinstance(config["quant_cfg"], list):
            config["quant_cfg"] += rules
        else:
            config["quant_cfg"].update({k: v for k, v in rules.items() if k != "default"})
    ids = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    with quiet(), torch.no_grad():
        mtq.quantize(model, config, lambda quantized: quantized(ids))
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=str(root / "exported"))
    return root / "exported"


def convert(
    unified: Path, root: Path, dtype: Dtype = "bfloat16", *, kv_fp8: bool = True
) -> Converted:
    """Run the convert stage with a cache below `root`."""
    cache = StageCache(root=root)
    result = convert_trtllm(unified, "0" * 64, cache, dtype=dtype, kv_fp8=kv_fp8)
    return Converted(unified, result.dir, result.read_json("conversion.json"))


def reconfigured(
    folder: Path, target: Path, edit: Callable[[dict[str, Any]], object], name: str = "config.json"
) -> Path:
    """A copy of a folder with a JSON file changed."""
    shutil.copytree(folder, target)
    content = json.loads((target / name).read_text())
    edit(content)
    (target / name).write_text(json.dumps(content))
    return target
