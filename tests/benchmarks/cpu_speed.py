"""The float32 decoder graph on ONNX Runtime against Transformers, contenders alternating.

    python -m tests.benchmarks.cpu_speed WEIGHTS_DIR

`WEIGHTS_DIR` is a Hugging Face folder, such as `files` of the embedded model in the weight cache.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from pipeline.formats.trtrtx.graph_writer import write_weights
from pipeline.formats.trtrtx.onnx_graph import build_decoder, save_graph
from pipeline.quant.unified import UnifiedCheckpoint
from pipeline.runners.onnxruntime import OnnxRuntimeGraph, graph_session
from pipeline.runners.runner import Session
from pipeline.runners.transformers import open_source

CONTEXTS = (128, 1024)
BATCHES = (1, 8)
ISL, OSL = 38, 64
REPEATS = 5


def read_bandwidth_gb_s() -> float:
    """Rate at which a sum reads 1 GiB of float32, second of two passes."""
    import torch

    values = torch.ones(1 << 28, dtype=torch.float32)
    values.sum()
    started = time.perf_counter()
    values.sum()
    return values.numel() * 4 / (time.perf_counter() - started) / 1e9


def main(weights_dir: Path) -> None:
    """Measure and print."""
    import numpy as np

    print(f"read bandwidth {read_bandwidth_gb_s():.1f} GB/s")
    checkpoint = UnifiedCheckpoint(weights_dir)
    with tempfile.TemporaryDirectory() as folder, open_source(weights_dir) as transformers:
        slots = write_weights(checkpoint, Path(folder) / "weights.bin")
        sessions: dict[str, Session] = {"transformers": transformers}
        for context in CONTEXTS:
            path = Path(folder) / f"context-{context}.onnx"
            model = build_decoder(checkpoint, slots, context=context, activation="float32")
            save_graph(model, path)
            sessions[f"graph, context {context}"] = graph_session(OnnxRuntimeGraph(path))
        rng = np.random.default_rng(0)
        for batch in BATCHES:
            prompts = rng.integers(0, checkpoint.spec.vocab_size, (batch, ISL)).tolist()
            rates: dict[str, list[float]] = {name: [] for name in sessions}
            for session in sessions.values():
                session.generate(prompts, 8)  # warm-up
            for _ in range(REPEATS):
                for name, session in sessions.items():
                    rates[name].append(batch * OSL / session.generate(prompts, OSL).total_s)
            base = statistics.median(rates["transformers"])
            for name, values in rates.items():
                median = statistics.median(values)
                print(
                    f"batch {batch}, {name}: {median:.1f} tok/s, {median / base:.2f} x, runs "
                    + json.dumps([round(value, 1) for value in values])
                )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
