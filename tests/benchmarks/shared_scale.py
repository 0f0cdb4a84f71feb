"""What one weight scale over fused tensors brings, in vLLM: KL to the source, ours against plain.

    python -m tests.benchmarks.shared_scale [RECIPE] [KEY=VALUE ...] [--windows 16] [--out FILE]

Both checkpoints are of the same weights and the same calibration, all linears FP8, and differ in
one thing: plain ModelOpt gives each of q, k, v, gate and up a scale of its own, which vLLM must
make equal by rounding again when it fuses them (vllm, `requantize_with_max_scale`). Needs a CUDA
device; the windows are of the recipe's acceptance text.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.acceptance.quality import (
    BOOTSTRAP_DRAWS,
    engine_figures,
    read_source_figures,
    summarize_quality,
    write_source_figures,
)
from pipeline.config.folders import config_folders
from pipeline.config.load import load
from pipeline.core.cache import StageCache
from pipeline.model.hf import load_tokenizer
from pipeline.quant import export, modelopt
from pipeline.quant.verify import Ledger
from pipeline.runners.transformers import open_source
from pipeline.runners.vllm import VllmRunner
from pipeline.sources.text.windows import pack_windows

RUNNER = VllmRunner(
    gpu_memory_utilization=0.5,
    arguments=("--enforce-eager",),
    load_timeout_s=400.0,
    answer_timeout_s=120.0,
)


@contextlib.contextmanager
def plain_modelopt() -> Iterator[None]:
    """Leave ModelOpt's own scales as they are."""
    module: Any = modelopt
    share, scale, verify = module.share_scales, export._scale, module.verify_checkpoint

    def own(name: str, value: float, cache_scales: Any) -> float:
        return scale(name, value, cache_scales) if name.endswith(export._CACHE) else value

    module.share_scales, export._scale = lambda *arguments: {}, own
    # It is strict about scales that are bfloat16 values, as ours are.
    module.verify_checkpoint = lambda *arguments: Ledger(
        precision="fp8", relative_error={}, kept_16bit=()
    )
    try:
        yield
    finally:
        module.share_scales, export._scale, module.verify_checkpoint = share, scale, verify


def main() -> None:
    """Measure and print."""
    import numpy as np

    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", nargs="?", default="smollm2")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--runner", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    (job,) = load(
        given.recipe, ["compiler=checkpoint", *given.overrides], folders=config_folders(None)
    ).jobs
    recipe: Any = job.value
    weights = recipe.source.fetch()
    quantizer = dataclasses.replace(recipe.quantizer, keep_16bit=())
    runner: Any = RUNNER
    if given.runner == "transformers":
        from pipeline.runners.transformers import TransformersRunner

        runner = TransformersRunner()
    with tempfile.TemporaryDirectory(prefix="enginesmith-bench-") as name:
        folder = Path(name)
        windows = pack_windows(
            recipe.acceptance.text.documents(),
            load_tokenizer(weights.dir),
            seq_len=recipe.acceptance.window_tokens,
            count=given.windows,
            seed=None,
        )
        (folder / "source").mkdir()
        with open_source(weights.dir) as session:
            write_source_figures(session, windows, folder / "source")
        source = read_source_figures(folder / "source")
        figures = {}
        for side in ("shared", "plain"):
            cache = StageCache(root=folder / side)
            with plain_modelopt() if side == "plain" else contextlib.nullcontext():
                checkpoint = quantizer.quantize(weights, recipe.calibration, cache)
            engine = recipe.compiler.compile(checkpoint, recipe.target, cache, folder)
            with runner.open(engine) as running:
                figures[side] = engine_figures(running.logits, windows, source)
    summary: dict[str, Any] = {
        side: summarize_quality(source.nll, found, 0) for side, found in figures.items()
    }
    difference = (figures["shared"].kl - figures["plain"].kl).mean(axis=1)
    rows = np.random.default_rng(0).integers(0, len(difference), (BOOTSTRAP_DRAWS, len(difference)))
    low, high = np.quantile(difference[rows].mean(axis=1), (0.025, 0.975))
    summary["kl_shared_minus_plain_nats"] = {
        "value": float(difference.mean()),
        "low": float(low),
        "high": float(high),
    }
    text = json.dumps({"recipe": given.recipe, "runner": given.runner, **summary}, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
