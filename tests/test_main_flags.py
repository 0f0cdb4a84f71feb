"""Hydra's own flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.__main__ import Request, main
from pipeline.core.errors import ExitCode


def test_hydras_flags_make_the_same_request(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []

    def run(request: Request) -> ExitCode:
        seen.append(request)
        return ExitCode.OK

    monkeypatch.setattr("pipeline.__main__.run", run)
    main(["--config-dir", "own", "--config-name", "toy", "size=1,2", "-m", "~x", "+y=3"])
    main(["-cn", "toy", "--rebuild"])
    assert seen == [
        Request(
            recipes="toy",
            overrides=("size=1,2", "~x", "+y=3"),
            multirun=True,
            config_dir=Path("own"),
        ),
        Request(recipes="toy", rebuild=True),
    ]
