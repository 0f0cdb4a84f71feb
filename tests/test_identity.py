"""What changes a build key, and what does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.compose import config_folders
from pipeline.config.load import load
from pipeline.config.recipe import Recipe, build_key, key_inputs
from pipeline.core.published import FileDigest, digest_of
from pipeline.core.values import Licence, Weights

ROOT = Path(__file__).parents[1]
WEIGHTS = Weights(
    dir=Path("/somewhere"),
    origin="hub:a/b",
    commit="a" * 40,
    files=(FileDigest(path="model.safetensors", size_bytes=1, sha256="0" * 64),),
    licence=Licence(spdx="MIT"),
)


def recipe(*overrides: str, compiler: str = "checkpoint") -> Recipe:
    given = ["name=own", f"compiler={compiler}", "target=rtx4090", *overrides]
    return load("smollm2", given, folders=config_folders(None)).value


def key(*overrides: str, compiler: str = "checkpoint") -> str:
    return build_key(recipe(*overrides, compiler=compiler), WEIGHTS)


KEYS = {compiler: key(compiler=compiler) for compiler in ("checkpoint", "trtllm", "trtrtx")}


@pytest.mark.parametrize(
    "overrides",
    [
        ["acceptance.windows=3"],
        ["registry.path=elsewhere"],
        ["runner=transformers"],
        ["target.source='another datasheet'"],
        ["target.power_w=1"],
        ["quantizer.device=cuda"],
    ],
    ids=str,
)
def test_acceptance_place_device_and_citation_change_no_key(overrides: Sequence[str]) -> None:
    assert key(*overrides, compiler="trtllm") == KEYS["trtllm"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["name=other"],
        ["version=2.0.0"],
        ["quantizer.keep_16bit=['model.layers.0.*']"],
        ["calibration.calib_size=31"],
        ["calibration.seed=1"],
        ["calibration.text.part=tune"],
    ],
    ids=str,
)
def test_what_shapes_bytes_or_stands_in_the_manifest_changes_the_key(
    overrides: Sequence[str],
) -> None:
    assert key(*overrides) != KEYS["checkpoint"]


@pytest.mark.parametrize("compiler", KEYS)
def test_limits_change_the_key(compiler: str) -> None:
    for change in ("max_batch_size=16", "max_seq_len=512", "kv_cache_dtype=bfloat16"):
        if compiler != "trtrtx" or "kv_cache" not in change:
            assert key(f"compiler.{change}", compiler=compiler) != KEYS[compiler], change


@pytest.mark.parametrize(
    ("compiler", "same_sm", "other_sm"),
    [("checkpoint", True, True), ("trtrtx", True, False), ("trtllm", False, False)],
)
def test_card_counts_only_for_what_is_bound_to_it(
    compiler: str, same_sm: bool, other_sm: bool
) -> None:
    assert (key("target=l4", compiler=compiler) == KEYS[compiler]) == same_sm
    assert (key("target=rtx5090", compiler=compiler) == KEYS[compiler]) == other_sm


@pytest.mark.parametrize(
    "change",
    [
        {"commit": "b" * 40},
        {"files": (FileDigest(path="model.safetensors", size_bytes=1, sha256="1" * 64),)},
        {"origin": "hub:a/c"},
        {"note": "was 4-bit once"},
        {"random": True},
        {"licence": Licence(spdx="Apache-2.0")},
        {"licence": Licence(spdx="MIT", notice="Built with it")},
        {"licence": Licence(spdx="MIT", redistribution="allowed")},
        {"licence": Licence(spdx="MIT", files=("LICENSE",))},
    ],
    ids=str,
)
def test_weights_and_their_terms_change_the_key(change: dict[str, Any]) -> None:
    assert build_key(recipe(), replace(WEIGHTS, **change)) != KEYS["checkpoint"]


@pytest.mark.parametrize(
    "change",
    [{"dir": Path("/elsewhere")}, {"licence": Licence(spdx="MIT", acknowledged="MIT")}],
    ids=str,
)
def test_where_weights_lie_and_who_acknowledged_changes_nothing(change: dict[str, Any]) -> None:
    assert build_key(recipe(), replace(WEIGHTS, **change)) == KEYS["checkpoint"]


def test_key_is_the_digest_of_what_a_manifest_holds_and_that_names_no_module() -> None:
    inputs = key_inputs(recipe(), WEIGHTS)
    assert digest_of(inputs) == KEYS["checkpoint"]
    assert "pipeline." not in str(inputs)
