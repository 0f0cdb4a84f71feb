"""What long work shows, on a terminal and elsewhere."""

from __future__ import annotations

import contextlib
import io
import logging
import time

import pytest

from pipeline.core.progress import BYTES, progress


def test_bar_stays_visible_while_stderr_is_redirected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")

    with progress("Converting", 100, BYTES), contextlib.redirect_stderr(io.StringIO()) as caught:
        time.sleep(0.3)  # the bar redraws itself ten times a second

    assert "Converting" not in caught.getvalue()
    assert "Converting" in capsys.readouterr().err


def test_log_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    now = iter([0.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))

    with progress("Downloading x", 100_000_000, BYTES) as advance:
        for _ in range(3):
            advance(25_000_000)

    assert [record.getMessage() for record in caplog.records] == [
        "Downloading x",
        "Downloading x: 50 of 100 MB, 2.5 MB/s, about 20 s left",
    ]
