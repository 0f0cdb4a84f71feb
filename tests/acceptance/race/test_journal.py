"""The journal: what is on disk counts, what was torn does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.acceptance.race.journal import JOURNAL, Journal, open_journal
from pipeline.core.errors import ConflictError, CorruptError, RecipeError

QUESTION = {"schema": 1, "gpu": "NVIDIA-H100", "engine": {"digest": "a"}}


def begun(folder: Path, *, resume: bool = False) -> Journal:
    journal = open_journal(folder, QUESTION, resume=resume)
    journal.begin(asked={"peer": 3})
    return journal


def sample(journal: Journal, contender: str, number: int, rate: float = 1.0) -> None:
    journal.add(
        "sample",
        peer="peer",
        workload="b1",
        round=number,
        contender=contender,
        output_tokens_per_s=rate,
    )


def test_a_round_counts_when_both_contenders_have_a_sample_of_it(tmp_path: Path) -> None:
    journal = begun(tmp_path / "race")
    for number, contender in ((0, "ours"), (0, "peer"), (1, "ours")):
        sample(journal, contender, number)
    assert [found.round for found in journal.rounds("peer", "b1")] == [0]
    assert journal.missing("peer", "b1", 3) == (1, 2)
    assert journal.missing("peer", "b2", 2) == (0, 1)


def test_samples_of_two_commands_are_no_pair(tmp_path: Path) -> None:
    sample(begun(tmp_path / "race"), "ours", 0)
    journal = begun(tmp_path / "race", resume=True)
    assert journal.command == 2
    sample(journal, "peer", 0)
    assert journal.rounds("peer", "b1") == ()
    sample(journal, "ours", 0)
    assert len(journal.rounds("peer", "b1")) == 1


def test_of_a_round_that_was_run_twice_the_first_counts(tmp_path: Path) -> None:
    folder = tmp_path / "race"
    for resume, rate in ((False, 5.0), (True, 9.0)):
        journal = begun(folder, resume=resume)
        sample(journal, "ours", 0, rate)
        sample(journal, "peer", 0, rate)
    (found,) = journal.rounds("peer", "b1")
    assert found.ours["output_tokens_per_s"] == 5.0


def test_a_torn_line_is_cut_off_and_writing_goes_on_behind_the_last_whole_one(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "race"
    sample(begun(folder), "ours", 0)
    path = folder / JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "sample", "comm')
    journal = begun(folder, resume=True)
    assert path.read_bytes().startswith(whole)
    assert [event["kind"] for event in journal.events] == ["command", "sample", "command"]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "race"
    sample(begun(folder), "ours", 0)
    path = folder / JOURNAL
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{second[:-9]}\n{second}\n")
    with pytest.raises(CorruptError, match="line 2"):
        Journal(folder)


def test_only_the_same_question_is_continued(tmp_path: Path) -> None:
    folder = tmp_path / "race"
    begun(folder)
    with pytest.raises(ConflictError, match="continue it with --resume"):
        open_journal(folder, QUESTION, resume=False)
    with pytest.raises(ConflictError, match=r"gpu was 'NVIDIA-H100', is 'NVIDIA-H200'"):
        open_journal(folder, {**QUESTION, "gpu": "NVIDIA-H200"}, resume=True)
    assert open_journal(folder, QUESTION, resume=True).command == 1


def test_there_must_be_a_race_to_continue_and_no_strangers_folder_is_taken(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no race; leave --resume out"):
        open_journal(tmp_path / "race", QUESTION, resume=True)
    (tmp_path / "photo.jpg").write_bytes(b"1")
    for resume in (True, False):
        with pytest.raises(ConflictError, match="name another folder"):
            open_journal(tmp_path, QUESTION, resume=resume)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photo.jpg"]
