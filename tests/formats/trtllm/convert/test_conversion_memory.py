"""A conversion streams: its memory follows the largest shard, not the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.model.read import read_spec
from tests.specs import tiny_config
from tests.tiny_recipe import ROOT, run_python

HIDDEN, INNER, LAYERS, VOCAB = 1024, 4096, 10, 4096
ALLOWANCE_BYTES = 8 << 20
"""What Python and NumPy take for themselves meanwhile."""

_CHILD = """
import json, sys
from pathlib import Path
import ml_dtypes, numpy
from pipeline.formats.trtllm.convert import write_checkpoint

def peak_bytes():
    # Not getrusage: a child's peak starts with its parent's there.
    line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

source, target = Path(sys.argv[1]), Path(sys.argv[2])
target.mkdir()
before = peak_bytes()
write_checkpoint(source, target, dtype=sys.argv[3], kv_fp8=False)
print(json.dumps(peak_bytes() - before))
"""


def write_sharded(folder: Path) -> int:
    """A Llama with a shard for each layer, scales that differ; returns the largest shard's size."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = tiny_config(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
    )
    (folder / "config.json").write_text(json.dumps(config))
    random, spec = np.random.default_rng(0), read_spec(config)
    shards: dict[str, dict[str, Any]] = {}
    for name, shape in spec.tensors().items():
        module, part = name.removesuffix(".weight"), name.rpartition("layers.")[2].split(".")[0]
        tensors = shards.setdefault(part if "layers." in name else "rest", {})
        tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        if module in spec.modules:
            codes = torch.from_numpy(random.integers(0, 120, shape, np.uint8))
            tensors[name] = codes.view(torch.float8_e4m3fn)
            tensors[f"{module}.weight_scale"] = torch.tensor(0.01 + 0.001 * (len(tensors) % 7))
            tensors[f"{module}.input_scale"] = torch.tensor(0.02)
    sizes = []
    for number, tensors in enumerate(shards.values()):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, file)
        sizes.append(file.stat().st_size)
    return max(sizes)


def test_peak_memory_is_at_most_twice_the_largest_shard(tmp_path: Path) -> None:
    largest = write_sharded(tmp_path / "sharded")
    whole = sum(path.stat().st_size for path in (tmp_path / "sharded").glob("*.safetensors"))
    bound = 2 * largest + ALLOWANCE_BYTES
    assert whole > 3 * bound  # else the case shows nothing
    for dtype in ("bfloat16", "float16"):  # copied, and cast
        paths = str(tmp_path / "sharded"), str(tmp_path / dtype)
        finished = run_python(ROOT, "-c", _CHILD, *paths, dtype)
        assert finished.returncode == 0, finished.stderr
        assert int(finished.stdout) <= bound
        written = (tmp_path / dtype / "rank0.safetensors").stat().st_size
        assert written > 0.95 * whole
