"""A checkpoint is judged through a simulation: by its answers, not by the simulation's speed."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tiny_recipe import CHECKPOINT, make_workplace


def test_speed_of_a_simulation_is_not_held_against_the_engine(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "place")
    keys = [override for override in CHECKPOINT if not override.startswith("runner=")]
    impossible = "{name: b1, batch: 1, isl: 8, osl: 8, min_ratio_to_transformers: 1000.0}"
    done = place.build(*keys, f"acceptance.cpu_workloads=[{impossible}]")
    assert done.returncode == 0, done.stderr
    verdict = place.verdict()
    assert verdict["verdict"] == "checked"
    report = json.loads(Path(verdict["report"]).read_text())
    assert report["conditions"]["runner"] == "transformers"
    assert report["quality"]["tokens"] > 0
    assert report["speed"] == []
    assert any(what.startswith("speed: ") for what in report["not_run"])
