"""The four commands of docs/trust.md, as they are written there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_recipe import CHECKPOINT, ROOT, make_workplace

_PAGE = ROOT / "docs" / "trust.md"


@pytest.mark.slow
def test_four_commands_take_a_team_from_nothing_to_verified_deployments(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "place")
    block = re.search(r"```sh\n(.*?)```", _PAGE.read_text(), re.DOTALL)
    assert block is not None
    lines = block[1].splitlines()
    assert len(lines) == 4
    # The one change: a recipe that is built in seconds.
    tiny = f"tiny {shlex.join(CHECKPOINT)} --config-dir {place.recipes}"
    script = block[1].replace("build smollm2", f"build {tiny}").replace("smollm2:", "tiny:")
    program = tmp_path / "bin" / "enginesmith"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m pipeline.cli "$@"\n')
    program.chmod(0o755)
    env = {**place.env, "PATH": f"{program.parent}:{place.env['PATH']}"}
    env = {name: value for name, value in env.items() if not name.startswith("ENGINESMITH_SIGN")}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=place.root,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    receipt = json.loads((place.root / "deployed" / "pull.json").read_text())
    assert receipt["signer"]["name"] == "ci"
