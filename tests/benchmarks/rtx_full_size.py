"""Compiles a recipe's real shape for TensorRT-RTX from random FP8 codes; prints time and memory.

    python -m tests.benchmarks.rtx_full_size mistral

The codes are written directly: quantizing a 7B model needs more memory than compiling it, and the
compiler's time and memory do not depend on the values, as long as no two layers are equal (it
stores equal weights once).
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.compose import config_folders
from pipeline.config.load import load
from pipeline.config.recipe import Recipe
from pipeline.core.cache import StageCache, digest_folder
from pipeline.core.values import Checkpoint, Licence, Weights, digest_of

if TYPE_CHECKING:
    import numpy as np

_CHUNK = 1 << 24


def random_checkpoint(recipe: Recipe, folder: Path) -> Checkpoint:
    """A unified FP8 checkpoint of the recipe's shape with random codes."""
    import numpy as np

    config = {**recipe.shape.config, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    header: dict[str, Any] = {}
    end = 0
    fp8 = []
    for name, shape in recipe.shape.tensors().items():
        linear = name.endswith("_proj.weight")
        size_bytes = int(np.prod(shape, dtype=np.int64)) * (1 if linear else 2)
        header[name] = {
            "dtype": "F8_E4M3" if linear else "BF16",
            "shape": list(shape),
            "data_offsets": [end, end + size_bytes],
        }
        end += size_bytes
        if linear:
            fp8.append(name.removesuffix(".weight"))
            for scale in ("weight_scale", "input_scale"):
                header[f"{fp8[-1]}.{scale}"] = {
                    "dtype": "F32",
                    "shape": [],
                    "data_offsets": [end, end + 4],
                }
                end += 4
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for entry in header.values():
            begin, end = entry["data_offsets"]
            for start in range(begin, end, _CHUNK):
                stream.write(_bytes(entry["dtype"], min(_CHUNK, end - start), rng))
    files = digest_folder(folder)
    weights = Weights(
        dir=folder,
        origin="random",
        commit=None,
        files=files,
        licence=Licence(spdx="CC0-1.0"),
        random=True,
    )
    return Checkpoint(
        dir=folder,
        digest=digest_of([file.to_json() for file in files]),
        weights=weights,
        precision="fp8",
        quantized_linears=tuple(fp8),
        kept_16bit=(),
        calibration={"tools": {}},
    )


def _bytes(dtype: str, size_bytes: int, rng: np.random.Generator) -> bytes:
    """Random values without NaN: magnitudes up to 448 in FP8, about 0.02 in bfloat16."""
    import ml_dtypes
    import numpy as np

    if dtype == "F32":
        return np.float32(0.0005).tobytes()
    values = rng.standard_normal(size_bytes if dtype == "F8_E4M3" else size_bytes // 2, np.float32)
    if dtype == "F8_E4M3":
        return (values * 80).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).tobytes()
    return (values * 0.02).astype(ml_dtypes.bfloat16).tobytes()


class Peak:
    """Largest memory of our youngest child process, sampled: anonymous, and with mapped files."""

    def __init__(self) -> None:
        self.anonymous_kib = self.resident_kib = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        while not self._done.wait(0.05):
            for child in psutil.Process().children():
                try:
                    status = Path(f"/proc/{child.pid}/status").read_text()
                except OSError:
                    continue
                fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
                self.anonymous_kib = max(self.anonymous_kib, _kib(fields.get("RssAnon", "0")))
                self.resident_kib = max(self.resident_kib, _kib(fields.get("VmRSS", "0")))


def _kib(text: str) -> int:
    return int(text.split()[0])


def main(name: str) -> None:
    """Convert, check, compile, prove; print what it took."""
    job = load(name, ["compiler=trtrtx"], folders=config_folders(None))
    recipe: Recipe = job.value
    with tempfile.TemporaryDirectory(prefix="rtx-full-size-") as folder:
        root = Path(folder)
        (root / "checkpoint").mkdir()
        checkpoint = random_checkpoint(recipe, root / "checkpoint")
        started = time.perf_counter()
        with Peak() as peak:
            engine = recipe.compiler.compile(
                checkpoint, recipe.target, StageCache(root=root / "cache"), root / "logs"
            )
        seconds = time.perf_counter() - started
        sizes = {
            "checkpoint": (root / "checkpoint" / "model.safetensors").stat().st_size,
            "engine": (engine.dir / "model.engine").stat().st_size,
        }
        stages = {
            record.parent.parent.name: json.loads(record.read_text())["seconds"]
            for record in (root / "cache" / "stages").glob("*/*/stage.json")
        }
    result = {
        "recipe": name,
        "params": recipe.shape.params,
        "seconds": round(seconds, 1),
        "stage_seconds": stages,
        "peak_anonymous_gb": round(peak.anonymous_kib * 1024 / 1e9, 2),
        "peak_resident_gb": round(peak.resident_kib * 1024 / 1e9, 2),
        "size_gb": {key: round(value / 1e9, 3) for key, value in sizes.items()},
        "checks": engine.checks["plan"],
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
