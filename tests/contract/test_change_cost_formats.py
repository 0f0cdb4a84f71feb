"""A new format is one folder and one conf file, a new precision one file and one conf file."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.build import plan_of, variant_of
from pipeline.config.compose import ConfigFolders
from pipeline.config.load import load
from pipeline.config.recipe import Recipe
from pipeline.core.cache import StageCache
from pipeline.core.errors import CorruptError
from pipeline.core.settings import data_dir
from pipeline.formats.spec import format_spec
from pipeline.quant.simulate import load_simulation
from pipeline.quant.unified import UnifiedCheckpoint
from tests.formats.decoder.decoders import graph_logits, model_logits, write_graph
from tests.quant.tiny_quantized import CALIBRATION, tiny_checkpoint, tiny_weights

SPEC = """\
from pipeline.formats.spec import FitRule, FormatSpec

SPEC = FormatSpec(
    name="toy",
    runtime="toybox",
    holds=lambda precision: True,
    kv_cache_dtypes=("bfloat16",),
    fit=FitRule(static=True, usable_share=0.5),
    bound_to="sm",
    runner="vllm",
    substitute="transformers",
    packages=(),
    files=("weights.bin",),
    serve_args=lambda limits: ("--batch", str(limits.max_batch_size)),
)
"""
COMPILER = """\
from pydantic.dataclasses import dataclass

from pipeline.core.cache import digest_folder
from pipeline.core.settings import STRICT
from pipeline.core.cache import Stage
from pipeline.core.published import digest_of
from pipeline.core.values import Engine, Limits
from pipeline.formats.toy.spec import SPEC
from pipeline.quant.spec import quant_spec

STAGE = Stage(name="toy", version=1, code=("pipeline.formats.toy",))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ToyCompiler:
    batch: int

    @property
    def format(self):
        return SPEC.name

    @property
    def limits(self):
        return Limits(
            max_batch_size=self.batch,
            max_seq_len=512,
            max_num_tokens=512,
            kv_cache_dtype="bfloat16",
        )

    @property
    def pinned_runtime(self):
        return SPEC.runtime, "1"

    def check_machine(self, target):
        pass

    def inputs(self, target):
        return {"batch": self.batch}

    def compile(self, checkpoint, target, cache, log_dir):
        def produce(out):
            (out / "engine").mkdir()
            data = (checkpoint.dir / "model.safetensors").read_bytes()
            (out / "engine" / "weights.bin").write_bytes(data)

        made = cache.run(STAGE, {"checkpoint": checkpoint.digest, **self.inputs(target)}, produce)
        files = digest_folder(made.dir / "engine")
        return Engine(
            dir=made.dir / "engine",
            digest=digest_of([file.to_json() for file in files]),
            format=SPEC.name,
            variant=SPEC.variant(quant_spec(checkpoint.precision), self.limits, target),
            runtime=self.pinned_runtime,
            sms=(target.sm,),
            limits=self.limits,
            min_vram_bytes=1,
            serve_args=SPEC.serve_args(self.limits),
        )


KIND = ToyCompiler
"""
FORMAT_OPTION = """\
defaults:
  - /runner@_global_.runner: transformers
  - _self_
kind: toy
batch: 4
"""
PRECISION = """\
\"\"\"E4M3 weights that are multiplied in 16 bit.\"\"\"

from dataclasses import replace

from pipeline.quant import fp8
from pipeline.quant.modelopt import ModelOptQuantizer
from pipeline.quant.spec import OnnxPattern


def config(kept, group):
    made = fp8.modelopt_config(kept, group)
    made["quant_cfg"].append({"quantizer_name": "*input_quantizer", "enable": False})
    return made


SPEC = replace(
    fp8.SPEC,
    name="toy8",
    title="toy",
    scales=("weight_scale",),
    quant_algo="TOY_W8A16",
    operands="fp16",
    native_sm=80,
    round_input=None,
    modelopt_config=config,
    onnx=OnnxPattern(weight=fp8.SPEC.onnx.weight, input=None, operands="bf16"),
)


class ToyQuantizer(ModelOptQuantizer):
    precision = SPEC.name


KIND = ToyQuantizer
"""


def put(folder: Path, files: dict[str, str]) -> None:
    """Write files by their paths below `folder`."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder whose `formats` and `quant` are searched like the project's own."""
    for room in ("formats", "quant"):
        (tmp_path / room).mkdir()
        package = importlib.import_module(f"pipeline.{room}")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / room)])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if ".toy" in name:
            del sys.modules[name]


def recipe(folder: Path, *overrides: str) -> Recipe:
    folders = ConfigFolders(recipes=(folder / "conf", data_dir("recipes")), conf=data_dir("conf"))
    job = load("smollm2", overrides, folders=folders)
    assert job.faults == ()
    return job.value


def test_a_format_is_one_folder_and_one_conf_file(joined: Path) -> None:
    put(
        joined,
        {
            "formats/toy/__init__.py": "",
            "formats/toy/spec.py": SPEC,
            "formats/toy/compiler.py": COMPILER,
            "conf/compiler/toy.yaml": FORMAT_OPTION,
        },
    )
    made = recipe(joined, "compiler=toy")
    plan = plan_of(made)
    assert plan.faults == ()
    assert plan.fit.usable_bytes == made.target.memory_bytes // 2
    assert plan.fit.static_kv_bytes == 4 * 512 * plan.fit.kv_bytes_per_token
    assert variant_of(made) == "sm89-toy-fp8-b4-s512"

    checkpoint = tiny_checkpoint(joined / "work")
    cache = StageCache(root=joined / "cache")
    engine = made.compiler.compile(checkpoint, made.target, cache, joined)
    format_spec("toy").require_files(engine.dir)
    with pytest.raises(CorruptError, match=r"has no weights\.bin"):
        format_spec("toy").require_files(checkpoint.dir)
    assert engine.variant == variant_of(made)
    assert engine.serve_args == ("--batch", "4")


def test_a_precision_is_one_file_and_one_conf_file(joined: Path) -> None:
    option = "kind: toy8\nkeep_16bit: []\n"
    put(joined, {"quant/toy8.py": PRECISION, "conf/quantizer/toy8.yaml": option})
    made = recipe(joined, "quantizer=toy8", "compiler=checkpoint", "quantizer.keep_16bit=[]")
    plan = plan_of(made)
    assert plan.faults == ()
    fp8 = plan_of(recipe(joined, "compiler=checkpoint", "quantizer.keep_16bit=[]"))
    scales = 210  # SmolLM2's linears have one instead of two
    assert fp8.sizes.weight_bytes - plan.sizes.weight_bytes == 4 * scales
    assert variant_of(made).startswith("any-checkpoint-toy8")

    cache = StageCache(root=joined / "cache")
    checkpoint = made.quantizer.quantize(tiny_weights(joined / "model"), CALIBRATION, cache)
    opened = UnifiedCheckpoint(checkpoint.dir)
    assert opened.precision.name == "toy8"
    assert not any(name.endswith("input_scale") for name in opened.tensors)
    assert 0 < max(checkpoint.ledger["relative_error"].values()) < 0.05
    tokens = [1, 5, 9, 30, 31, 2]
    graph = write_graph(checkpoint.dir, joined / "graph")
    wanted = model_logits(load_simulation(checkpoint.dir), tokens)
    np.testing.assert_allclose(graph_logits(graph, tokens), wanted, rtol=1e-4, atol=1e-4)

    engine = made.compiler.compile(checkpoint, made.target, cache, joined)
    declared = json.loads((engine.dir / "hf_quant_config.json").read_text())["quantization"]
    assert declared["quant_algo"] == "TOY_W8A16"
