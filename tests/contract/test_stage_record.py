"""The record of stages: an edit of a caching stage asks whether its output changed."""

from __future__ import annotations

import ast

import pytest
import yaml

from pipeline.core.cache import RECORD_FILE
from tests.contract.test_house import TREES, imported
from tests.record_stages import all_stages

SHAPING = ("pipeline.model", "pipeline.quant", "pipeline.core.safetensors_files")
"""Every line of these may shape bytes; families and precisions are found by their names."""


@pytest.mark.parametrize("name", all_stages())
def test_recorded_code_is_the_code(name: str) -> None:
    stage, records = all_stages()[name], yaml.safe_load(RECORD_FILE.read_text()) or {}
    assert records.get(name) == stage.record, (
        f"the code of stage {name} ({', '.join(stage.code)}) is not what {RECORD_FILE.name} "
        "records. Output changed? Raise the version in its Stage(...). Then, or else: "
        "make record-stages"
    )


@pytest.mark.parametrize("name", all_stages())
def test_the_code_of_a_stage_has_all_that_shapes_bytes_for_it(name: str) -> None:
    own = [f"{one}." for one in all_stages()[name].code]
    code = [tree for one, tree in TREES.items() if f"{one}.".startswith(tuple(own))]
    used = {f"{one}." for tree in code for one in imported(ast.walk(tree))}
    wanted = {f"{one}." for one in SHAPING if any(each.startswith(f"{one}.") for each in used)}
    assert wanted <= {*own}


def test_no_stage_is_recorded_that_is_gone() -> None:
    assert set(yaml.safe_load(RECORD_FILE.read_text())) == set(all_stages())
