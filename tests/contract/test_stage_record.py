"""The record of stages: an edit of a caching stage asks whether its output changed."""

from __future__ import annotations

import pytest
import yaml

from pipeline.core.cache import RECORD_FILE
from tests.record_stages import all_stages


@pytest.mark.parametrize("name", all_stages())
def test_recorded_code_is_the_code(name: str) -> None:
    stage, records = all_stages()[name], yaml.safe_load(RECORD_FILE.read_text()) or {}
    assert records.get(name) == stage.record, (
        f"the code of stage {name} ({', '.join(stage.code)}) is not what {RECORD_FILE.name} "
        "records. Output changed? Raise the version in its Stage(...). Then, or else: "
        "make record-stages"
    )


def test_no_stage_is_recorded_that_is_gone() -> None:
    assert set(yaml.safe_load(RECORD_FILE.read_text())) == set(all_stages())
