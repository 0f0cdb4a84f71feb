from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest

from pipeline.commands.screen import file_logging, screen_logging, show_error


def test_screen_shows_our_progress_and_everybodys_warnings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with screen_logging():
        logging.getLogger("pipeline.build").info("Compiled in %d s", 3)
        logging.getLogger("pipeline.build").debug("a detail")
        logging.getLogger("library").info("chatter")
        logging.getLogger("library").warning("careful")
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["Compiled in 3 s", "warning: careful"]


def test_python_warnings_go_to_the_log_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with screen_logging(), file_logging(tmp_path / "build.log"), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("deprecated since long", stacklevel=1)
    assert capsys.readouterr().err == ""
    assert "deprecated since long" in (tmp_path / "build.log").read_text()


def test_full_disk_does_not_turn_log_lines_into_failures() -> None:
    with screen_logging(), file_logging(Path("/dev/full")):
        logging.getLogger("pipeline.build").info("one line")


def test_error_is_not_wrapped_or_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    message = "[/x] " + "path/" * 60
    show_error(message)
    assert capsys.readouterr().err == f"error: {message}\n"
