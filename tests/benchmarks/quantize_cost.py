"""What the FP8 step costs beside the bare ModelOpt calls: same model, same text, one run.

    python -m tests.benchmarks.quantize_cost [SHAPE] [--calib-size 128] [--seq-len 512]

SHAPE is one of recipes/shapes, `phi3` by default, with random weights: nothing is downloaded. Both
sides load the model, put it on the device and cut the text outside the measured time. They
alternate; each is measured REPEATS times, the first run of the bare calls is a warm-up.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.core import cache
from pipeline.core.settings import data_dir
from pipeline.core.values import Weights
from pipeline.model.hf import load_model, load_tokenizer, quiet
from pipeline.model.read import read_spec
from pipeline.model.spec import ModelSpec
from pipeline.quant import modelopt
from pipeline.quant.calibration import free_vram_bytes
from pipeline.quant.fp8 import Fp8Quantizer, modelopt_config
from pipeline.rehearse import RandomSource
from pipeline.sources.text import corpus
from pipeline.sources.text.corpus import Calibration, pack_windows
from pipeline.sources.text.topics import PydocTopics

REPEATS = 2
APART = (
    (modelopt, "load_model"),
    (modelopt, "place"),
    (corpus, "pack_windows"),
    (modelopt, "verify_checkpoint"),
    (cache, "digest_folder"),
    (cache, "_sync"),
)
"""Parts of our stage whose time is taken apart: the bare calls do not have them, or not in the
measured time. Verification, the digest and forcing to disk are printed beside it."""


def shape_named(name: str) -> ModelSpec:
    """A shape of recipes/shapes."""
    path = data_dir("recipes") / "shapes" / f"{name}.yaml"
    values = yaml.safe_load(path.read_text())
    return read_spec(values)


@contextlib.contextmanager
def taken_apart(parts: tuple[tuple[Any, str], ...]) -> Iterator[dict[str, float]]:
    """Seconds spent in functions of some modules."""
    spent: dict[str, float] = defaultdict(float)
    kept = [(module, name, getattr(module, name)) for module, name in parts]

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                synchronize()
                spent[name] += time.perf_counter() - started

        return call

    for module, name, function in kept:
        setattr(module, name, timed(name, function))
    try:
        yield spent
    finally:
        for module, name, function in kept:
            setattr(module, name, function)


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ours(
    quantizer: Fp8Quantizer, asked: Calibration, weights: Weights, shape: ModelSpec, folder: Path
) -> Any:
    """Our step: seconds of quantize + export, and of what was taken apart."""
    with taken_apart(APART) as spent:
        started = time.perf_counter()
        quantizer.quantize(weights, asked, cache.StageCache(root=folder))
        total = time.perf_counter() - started
    return {
        "quantize_and_export_s": total - sum(spent.values()),
        **spent,
        "total_s": total,
    }


def bare(
    quantizer: Fp8Quantizer, asked: Calibration, weights: Weights, folder: Path
) -> dict[str, float]:
    """ModelOpt alone: `mtq.quantize` and `export_hf_checkpoint`."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    device = "cpu" if free_vram_bytes() is None or quantizer.device == "cpu" else "cuda"
    model = load_model(weights.dir, "bfloat16" if device == "cuda" else "float32").to(device)
    windows = torch.from_numpy(
        pack_windows(
            asked.text.documents(),
            load_tokenizer(weights.dir),
            seq_len=asked.seq_len,
            count=asked.calib_size,
            seed=asked.seed,
        )
    ).to(device)

    def forward_loop(quantized: Any) -> None:
        with torch.no_grad():
            for batch in torch.split(windows, asked.batch_size):
                quantized.base_model(batch, use_cache=False)

    synchronize()
    started = time.perf_counter()
    with quiet():
        mtq.quantize(model, modelopt_config([]), forward_loop)
        synchronize()
        quantized_s = time.perf_counter() - started
        export_hf_checkpoint(model, dtype=model.dtype, export_dir=str(folder))
    total = time.perf_counter() - started
    return {
        "quantize_s": quantized_s,
        "export_s": total - quantized_s,
        "quantize_and_export_s": total,
    }


def fresh() -> None:
    """Let go of the last model."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", nargs="?", default="phi3")
    parser.add_argument("--calib-size", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    given = parser.parse_args()
    shape, text = shape_named(given.shape), PydocTopics(part="calibrate")
    asked = Calibration(
        text=text,
        calib_size=given.calib_size,
        seq_len=given.seq_len,
        batch_size=given.batch_size,
        seed=0,
    )
    quantizer = Fp8Quantizer(device=given.device)
    runs: dict[str, list[dict[str, float]]] = {"bare": [], "ours": []}
    with tempfile.TemporaryDirectory(prefix="enginesmith-bench-") as name:
        folder = Path(name)
        source = RandomSource(shape=shape, folder=folder / "weights", documents=text.documents())
        weights = source.fetch()
        for turn in range(REPEATS + 1):
            for side in ("bare", "ours") if turn else ("bare",):
                out = folder / f"{side}-{turn}"
                fresh()
                measured = (
                    bare(quantizer, asked, weights, out)
                    if side == "bare"
                    else ours(quantizer, asked, weights, shape, out)
                )
                print(side, turn, {key: round(value, 2) for key, value in measured.items()})
                if turn:
                    runs[side].append(measured)
                shutil.rmtree(out)
    key = "quantize_and_export_s"
    medians = {side: statistics.median(run[key] for run in found) for side, found in runs.items()}
    ratio = medians["ours"] / medians["bare"]
    print(f"quantize + export: ours {medians['ours']:.2f} s, bare {medians['bare']:.2f} s")
    print(f"ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
