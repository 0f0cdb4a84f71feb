from __future__ import annotations

from pathlib import Path

from pipeline.core.errors import ExitCode
from pipeline.outcome import (
    Outcome,
    closing_lines,
    failure_of,
    open_run,
    write_verdict,
)


def test_runs_in_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    first, second = (open_run(tmp_path / "artifacts") for _ in range(2))
    assert first != second
    assert (first.parent / "latest").resolve() == second.resolve()
    assert sorted(path.name for path in first.parent.iterdir()) == [
        first.name, second.name, "latest"
    ]  # fmt: skip


def test_verdict_replaces_the_one_before_in_one_step(tmp_path: Path) -> None:
    for code in (0, 3):
        write_verdict(tmp_path, {"exit_code": code})
    assert [path.name for path in tmp_path.iterdir()] == ["verdict.json"]
    assert '"exit_code": 3' in (tmp_path / "verdict.json").read_text()


def test_rejected_package_offers_no_command() -> None:
    rejected = Outcome(exit_code=ExitCode.NOT_ACCEPTED, message="", verdict="rejected")
    assert closing_lines(rejected, "enginesmith generate") == "verdict  rejected"


def test_full_disk_is_transient_also_in_the_words_of_the_safetensors_library() -> None:
    from safetensors import SafetensorError

    seen = "Error while serializing: I/O error: No space left on device (os error 28)"
    outcome = failure_of(SafetensorError(seen))
    assert outcome.exit_code is ExitCode.TRANSIENT
    assert "free some space" in outcome.message
    assert failure_of(SafetensorError("HeaderTooSmall")).exit_code is ExitCode.FAILED
