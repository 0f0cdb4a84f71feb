"""Plans of the stand-in for TensorRT-RTX, the stand-in itself, and an engine in host memory."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.formats.trtrtx.compiler import TrtRtxCompiler
from pipeline.formats.trtrtx.spec import PLAN_FILE
from pipeline.runners.decode import DecoderSession
from pipeline.runners.tensorrt_rtx import open_plan

PACKAGES = Path(__file__).parent / "fake_packages"
CONTEXT = 48
MAX_BATCH, MAX_PREFILL = 5, 2
COMPILER = TrtRtxCompiler(
    max_batch_size=MAX_BATCH,
    opt_batch_size=1,
    max_prefill_batch_size=MAX_PREFILL,
    max_seq_len=CONTEXT,
    activation_dtype="bfloat16",
    kv_cache_dtype="bfloat16",
)


def fake_tensorrt_rtx() -> ModuleType:
    """A fresh one."""
    path = PACKAGES / "tensorrt_rtx" / "__init__.py"
    spec = importlib.util.spec_from_file_location("tensorrt_rtx", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def open_on_host(**arguments: Any) -> Iterator[DecoderSession]:
    """As `open_plan`, in a child whose TensorRT-RTX is the stand-in, in this machine's memory."""
    from tensorrt_rtx import HostDevice

    with open_plan(**arguments, open_device=HostDevice) as session:
        yield session


def write_plan(
    graph: Path,
    out_dir: Path,
    *,
    cache: str = "FLOAT",
    prefill_logits: int = 1,
    faults: dict[str, Any] | None = None,
) -> Path:
    """The plan of a float32 ONNX graph, with the profiles that the compiler gives."""
    import onnx

    inputs = onnx.load(str(graph), load_external_data=False).graph.input
    dims = {x.name: tuple(d.dim_value for d in x.type.tensor_type.shape.dim) for x in inputs}
    decode, prefill = COMPILER.profiles
    prefill = dataclasses.replace(prefill, logits=(1, 1, prefill_logits))
    plan = {
        "graph": str(graph),
        "cache": cache,
        "profiles": [
            {name: profile.shapes(name, sizes) for name, sizes in dims.items()}
            for profile in (decode, prefill)
        ],
        "faults": faults or {},
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / PLAN_FILE
    path.write_text(json.dumps(plan))
    return path
