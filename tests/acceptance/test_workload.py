"""Workloads beyond one batch of equal prompts: waves, lengths, files; and what names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline.core.errors import Fault, RecipeError
from pipeline.core.published import digest_of
from pipeline.runners.workload import Lengths, Workload
from tests.tiny import VOCAB_SIZE, tiny_tokenizer

PLAIN = Workload(name="b2", batch=2, isl=8, osl=4)


def load(**changes: Any) -> Workload:
    """As a recipe gives it: a mapping."""
    made = TypeAdapter(Workload).validate_python(
        {"name": "b2", "batch": 2, "isl": 8, "osl": 4, **changes}
    )
    assert isinstance(made, Workload)
    return made


def lines(folder: Path, *prompts: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(prompt)}\n" for prompt in prompts))
    return path


def faults(workload: Workload) -> tuple[Fault, ...]:
    return workload.faults("acceptance.targets[1]")


def test_todays_workloads_keep_their_digest_and_their_prompts() -> None:
    assert PLAIN.digest == digest_of({"batch": 2, "isl": 8, "osl": 4})
    assert load(requests=2, warm_ups=1).digest == PLAIN.digest
    drawn = np.random.default_rng(3).integers(0, 50, (2, 8))
    assert [list(prompt) for prompt in PLAIN.request_prompts(50, 3)] == drawn.tolist()


def test_every_part_of_the_load_is_in_the_digest(tmp_path: Path) -> None:
    one, other = (tmp_path / "one"), (tmp_path / "other")
    one.mkdir()
    other.mkdir()
    files = [
        lines(one, {"token_ids": [1]}, {"token_ids": [2]}),
        lines(other, {"token_ids": [1]}, {"token_ids": [3]}),
    ]
    loads = [
        PLAIN,
        load(batch=1),
        load(requests=4),
        load(isl_distribution={"min": 1}),
        load(isl_distribution={"min": 2}),
        load(isl_distribution={"min": 1, "mean": 4.0, "stdev": 2.0}),
        load(isl_distribution={"min": 1, "mean": 4.0, "stdev": 3.0}),
        load(seed=0),
        load(seed=1),
        load(warm_ups=2),
        load(ignore_eos=False),
        load(osl_distribution={"min": 1}),
        load(requests=4, request_rate=1.0),
        load(requests=4, request_rate=2.0),
        *(load(prompts_file=str(path)) for path in files),
    ]
    digests = [one.digest for one in loads]
    assert len(set(digests)) == len(loads)
    assert load(ignore_eos=True, request_rate=None).digest == PLAIN.digest
    moved = one / "moved.jsonl"
    files[0].rename(moved)
    assert load(prompts_file=str(moved)).digest == digests[-2]
    assert load(requests=4, min_output_tokens_per_s=9.0).digest == load(requests=4).digest


def test_normal_lengths_have_their_mean_and_deviation() -> None:
    drawn = Lengths(min=1, mean=500.0, stdev=40.0).draw(1000, 5000, (0, 1))
    # Three standard errors: 40 / sqrt(5000) = 0.57, and 40 / sqrt(2 x 5000) = 0.4.
    assert np.mean(drawn) == pytest.approx(500, abs=1.7)
    assert np.std(drawn) == pytest.approx(40, abs=1.2)


def test_cut_off_lengths_do_not_pile_up_at_the_ends() -> None:
    drawn = Lengths(min=1, mean=4.0, stdev=100.0).draw(7, 7000, (0, 1))
    counts = np.bincount(drawn)[1:]
    assert counts.shape == (7,)
    # Nearly uniform, 1000 each; four standard deviations of a count: 4 x sqrt(7000 x 6) / 7 = 117.
    assert abs(counts - 1000).max() < 120


def test_ragged_prompts_are_as_long_as_drawn_and_in_the_vocabulary() -> None:
    workload = load(requests=6, isl_distribution={"min": 2})
    prompts = workload.request_prompts(11, 4)
    assert len(prompts) == 6
    assert workload.isl_distribution is not None
    assert [len(prompt) for prompt in prompts] == workload.isl_distribution.draw(8, 6, (4, 1))
    assert max(max(prompt) for prompt in prompts) < 11


def test_file_gives_its_first_prompts_as_ids_or_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    path = lines(tmp_path, {"prompt": "The engine"}, {"token_ids": [3, 4]}, {"token_ids": [5]})
    workload = load(prompts_file=str(path), isl=64)
    assert faults(workload) == ()
    expected = tuple(tokenizer("The engine")["input_ids"])
    assert workload.request_prompts(VOCAB_SIZE, 0, tokenizer) == (expected, (3, 4))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "has 0 prompts"),
        ('{"token_ids": [1]}\n', r"has 1 prompts, the workload b2 has 2 requests"),
        ('{"token_ids": [1]}\n[1]\n', "line 2: .*wanted {.prompt"),
        ('{"prompt": "a", "token_ids": [1]}\n', "line 1: .*both keys or none"),
        ('{"token_ids": [1.5]}\n', "line 1.token_ids"),
        ('{"token_ids": [1,2,3,4,5,6,7,8,9]}\n' * 2, "line 2 has 9 tokens, isl allows 1 to 8"),
    ],
)
def test_fault_of_a_file_is_told_with_config_path_and_line(
    tmp_path: Path, content: str, told: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    found = faults(load(prompts_file=str(path)))
    assert {fault.path for fault in found} == {"acceptance.targets[1].prompts_file"}
    with pytest.raises(RecipeError, match=told):
        raise RecipeError(found)


def test_file_that_is_missing_or_no_text_is_told(tmp_path: Path) -> None:
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.jsonl", binary, tmp_path):
        (fault,) = faults(load(prompts_file=str(path)))
        assert "cannot be read as UTF-8 text" in fault.message


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    workload = load(prompts_file=str(lines(tmp_path, {"token_ids": [1]}, {"token_ids": [9]})))
    assert workload.request_prompts(10, 0) == ((1,), (9,))
    with pytest.raises(RecipeError, match="line 2 has token id 9, the vocabulary ends at 9"):
        workload.request_prompts(9, 0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"requests": 3}, r"requests \(3\) must be a multiple of batch \(2\)"),
        ({"isl_distribution": {"min": 9}}, r"min \(9\) <= mean"),
        ({"isl_distribution": {"min": 1, "mean": 2.0}}, "mean and stdev go together"),
        ({"isl_distribution": {"min": 1}, "prompts_file": "x"}, "keep one of them"),
        ({"osl_distribution": {"min": 5}}, r"osl_distribution must have min \(5\) .* osl \(4\)"),
        ({"request_rate": 2.0}, "request_rate needs requests"),
        (
            {"request_rate": 2.0, "requests": 4, "min_output_tokens_per_s": 8.1},
            "brings 8 output tokens per second at most, min_output_tokens_per_s is 8.1",
        ),
    ],
)
def test_what_cannot_be_executed_cannot_be_written(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        load(**changes)
