"""The tiny model, calibrated by the real ModelOpt: what quantizer and compiler tests start from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.cache import StageCache, digest_folder
from pipeline.core.hardware import Target
from pipeline.core.values import Checkpoint, Licence, Weights
from pipeline.model.spec import ModelSpec
from pipeline.quant.fp8 import Fp8Quantizer
from pipeline.sources.text.corpus import Calibration
from tests.architectures import tiny_architecture
from tests.specs import spec_of_folder
from tests.tiny import TEXT, tiny_model

ADA = Target(
    id="ada",
    card="NVIDIA-Ada",
    sm=89,
    memory_gib=24.0,
    bandwidth_gb_s=1000.0,
    tflops={"fp16": 100.0, "fp8": 200.0},
    power_w=300,
    source="test",
)


@dataclass(frozen=True)
class RepeatedText:
    """One document: the text that the tiny tokenizer was trained on, many times."""

    repeats: int = 20

    @property
    def origin(self) -> str:
        return "repeated"

    def documents(self) -> tuple[str, ...]:
        return (TEXT * self.repeats,)


def tiny_weights(folder: Path, **overrides: Any) -> Weights:
    """The tiny model as a source would hand it over."""
    return local_weights(tiny_model(folder, **overrides))


def local_weights(folder: Path) -> Weights:
    """A folder of tests.tiny or tests.architectures as a source would hand it over."""
    return Weights(
        dir=folder,
        origin="local:tiny",
        commit=None,
        files=digest_folder(folder),
        licence=Licence(spdx="Apache-2.0", files=("LICENSE",)),
    )


def shape_of(weights: Weights) -> ModelSpec:
    return spec_of_folder(weights.dir)


CALIBRATION = Calibration(text=RepeatedText(), calib_size=2, seq_len=32, batch_size=2, seed=1)
"""Two windows of 32 tokens."""


def tiny_quantizer(*keep_16bit: str) -> Fp8Quantizer:
    """On the CPU."""
    return Fp8Quantizer(keep_16bit=keep_16bit, device="cpu")


def architecture_checkpoint(
    root: Path, name: str, *keep_16bit: str, **overrides: Any
) -> Checkpoint:
    """A tiny model of `tests.architectures`, quantized below `root`."""
    folder = root / name
    if not folder.exists():
        tiny_architecture(name, folder, **overrides)
    cache = StageCache(root=root / "cache")
    return tiny_quantizer(*keep_16bit).quantize(local_weights(folder), CALIBRATION, cache)


Tensors = dict[str, Any]
Edit = Callable[[Tensors], object]


def drop(*names: str) -> Edit:
    """Edits for `edited`: leave tensors out."""
    return lambda tensors: [tensors.pop(name) for name in names]


def fill(name: str, value: float) -> Edit:
    """Every element becomes `value`."""
    return lambda tensors: tensors.update({name: tensors[name] * 0 + value})


def multiply(name: str, factor: float) -> Edit:
    """Every element times `factor`."""
    return lambda tensors: tensors.update({name: tensors[name] * factor})


def shorten(name: str, rows: int) -> Edit:
    """The first rows alone."""
    return lambda tensors: tensors.update({name: tensors[name][:rows].clone()})


def copy(name: str, copied: str) -> Edit:
    """A tensor once more, as `copied`."""
    return lambda tensors: tensors.update({copied: tensors[name].clone()})


def repeat(name: str, times: int) -> Edit:
    """A scale as a vector of `times`."""
    return lambda tensors: tensors.update({name: tensors[name].reshape(1).repeat(times)})


def edited(folder: Path, target: Path, edit: Edit) -> Path:
    """A copy of a folder with the tensors of its one safetensors file changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def tiny_checkpoint(root: Path, *keep_16bit: str) -> Checkpoint:
    """A checkpoint below `root`, with its weights and cache."""
    weights = tiny_weights(root / "model")
    cache = StageCache(root=root / "cache")
    return tiny_quantizer(*keep_16bit).quantize(weights, CALIBRATION, cache)
