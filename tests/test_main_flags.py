"""Hydra's own flags."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.__main__ import Request, main
from pipeline.core.errors import ExitCode


def test_hydras_flags_make_the_same_request(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []

    def run(request: Request) -> ExitCode:
        seen.append(request)
        return ExitCode.OK

    monkeypatch.setattr("pipeline.__main__.run", run)
    main(["--config-dir", "own", "--config-name", "toy", "size=1", "~x", "+y=3"])
    main(["-cn", "toy", "--rebuild"])
    assert seen == [
        Request(
            recipe="toy",
            overrides=("size=1", "~x", "+y=3"),
            config_dir=Path("own"),
        ),
        Request(recipe="toy", rebuild=True),
    ]


def test_composed_recipe_is_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["-cn", "smollm2", "--cfg", "job", "compiler.max_seq_len=512"]) is ExitCode.OK
    assert yaml.safe_load(capsys.readouterr().out)["compiler"]["max_seq_len"] == 512
    assert main(["-cn", "smollm2", "--cfg", "job", "compiler.max_seq_len=x"]) is ExitCode.USAGE
    assert main(["-cn", "nosuch", "--info", "defaults"]) is ExitCode.USAGE
    assert main(["-cn", "smollm2", "--info", "defaults-tree"]) is ExitCode.OK
    assert "compiler: trtrtx" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [], "nothing is built"
