from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.folders import config_folders
from pipeline.config.load import load
from pipeline.core.hardware import Target
from pipeline.core.values import FileDigest, Licence, Weights
from pipeline.formats.checkpoint.compiler import CheckpointCompiler
from pipeline.identity import build_key, shaping_config
from pipeline.quant.fp8 import Fp8Quantizer
from tests.quant.tiny_quantized import ADA, CALIBRATION, tiny_quantizer

WEIGHTS = Weights(
    dir=Path("/somewhere"),
    origin="hub:a/b",
    commit="a" * 40,
    files=(FileDigest(path="model.safetensors", size_bytes=1, sha256="0" * 64),),
    licence=Licence(spdx="MIT"),
)
COMPILER = CheckpointCompiler(
    max_batch_size=4,
    max_seq_len=128,
    max_num_tokens=128,
    kv_cache_dtype="fp8",
    runtime="vllm",
    runtime_version="1",
)
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "source": {"path": "/home/me/model", "licence": "MIT"},
    "compiler": {"max_batch_size": 4},
    "quantizer": {"keep_16bit": []},
    "target": {"sm": 89},
    "acceptance": {"windows": 4},
    "registry": {"root": "artifacts"},
    "runner": {"threads": 2},
}
SMOLLM2 = load("smollm2", [], folders=config_folders(None)).one_job().value


def key(
    weights: Weights,
    target: Target,
    quantizer: Fp8Quantizer,
    compiler: CheckpointCompiler,
    config: dict[str, Any],
) -> str:
    recipe = dataclasses.replace(
        SMOLLM2, target=target, quantizer=quantizer, compiler=compiler, calibration=CALIBRATION
    )
    return build_key(recipe, weights, config)


KEY = key(WEIGHTS, ADA, tiny_quantizer(), COMPILER, CONFIG)


@pytest.mark.parametrize("group", ["acceptance", "registry", "runner"])
def test_key_ignores_what_only_judges_and_places(group: str) -> None:
    changed = {**CONFIG, group: {"other": 1}}
    assert key(WEIGHTS, ADA, tiny_quantizer(), COMPILER, changed) == KEY


def test_key_ignores_where_the_weights_lie() -> None:
    moved = dataclasses.replace(WEIGHTS, dir=Path("/elsewhere"))
    config = {**CONFIG, "source": {"path": "/elsewhere", "licence": "MIT"}}
    assert key(moved, ADA, tiny_quantizer(), COMPILER, config) == KEY


def test_key_changes_with_the_bytes_of_the_weights() -> None:
    (file,) = WEIGHTS.files
    other = dataclasses.replace(WEIGHTS, files=(dataclasses.replace(file, sha256="1" * 64),))
    assert key(other, ADA, tiny_quantizer(), COMPILER, CONFIG) != KEY


def test_key_changes_with_the_commit() -> None:
    other = dataclasses.replace(WEIGHTS, commit="b" * 40)
    assert key(other, ADA, tiny_quantizer(), COMPILER, CONFIG) != KEY


def test_key_changes_with_the_layers_kept_in_16_bit() -> None:
    other = tiny_quantizer("model.layers.0.*")
    assert key(WEIGHTS, ADA, other, COMPILER, CONFIG) != KEY


def test_key_changes_with_the_sm() -> None:
    other = dataclasses.replace(ADA, sm=120)
    assert key(WEIGHTS, other, tiny_quantizer(), COMPILER, CONFIG) != KEY


def test_key_changes_with_the_cache_type() -> None:
    other = dataclasses.replace(COMPILER, kv_cache_dtype="bfloat16")
    assert key(WEIGHTS, ADA, tiny_quantizer(), other, CONFIG) != KEY


@pytest.mark.parametrize(
    "change",
    [
        {"compiler": {"max_batch_size": 8}},
        {"quantizer": {"keep_16bit": ["x"]}},
        {"source": {"path": "/home/me/model", "licence": "Apache-2.0"}},
        {"target": {"sm": 90}},
        {"name": "other"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_key_changes_with_every_other_setting(change: dict[str, Any]) -> None:
    assert key(WEIGHTS, ADA, tiny_quantizer(), COMPILER, {**CONFIG, **change}) != KEY


def test_manifest_config_holds_no_local_path_and_leaves_its_input_alone() -> None:
    assert shaping_config(CONFIG)["source"] == {"licence": "MIT"}
    assert CONFIG["source"]["path"] == "/home/me/model"
