import json
from pathlib import Path

import pytest

from pipeline.core.errors import CorruptError, NotFoundError, RecipeError
from pipeline.sources.text.corpus import require_disjoint, shared_ngrams, text_digest
from pipeline.sources.text.file import TextFile
from pipeline.sources.text.topics import PARTS, PydocTopics, related_topics

RUN = " ".join(f"word{n}" for n in range(13))


def test_topics_split_into_three_disjoint_parts_that_cover_everything() -> None:
    from pydoc_data.topics import topics

    parts = {part: PydocTopics(part=part).documents() for part in PARTS}
    assert sorted(text for part in parts.values() for text in part) == sorted(topics.values())
    for first, second in (("calibrate", "tune"), ("calibrate", "judge"), ("tune", "judge")):
        assert shared_ngrams(parts[first], parts[second]) == 0  # type: ignore[index]


def test_judge_part_is_large_enough_for_a_verdict() -> None:
    # The verdict needs 8,192 tokens; English has under 6 characters a token.
    assert sum(map(len, PydocTopics(part="judge").documents())) > 6 * 8192


def test_topics_that_share_a_section_stay_together() -> None:
    assert related_topics({"a": f"x {RUN} y", "b": f"z {RUN}", "c": "other"}) == [
        ("a", "b"),
        ("c",),
    ]


def test_overlap_with_calibration_is_refused() -> None:
    require_disjoint((RUN,), (RUN[:-1],), "acceptance.text")
    with pytest.raises(RecipeError, match="shares 1 runs of 13 words"):
        require_disjoint((f"a {RUN}",), (f"{RUN} b",), "acceptance.text")


def test_text_digest_depends_on_text_and_its_division() -> None:
    assert len({text_digest(["ab"]), text_digest(["a", "b"]), text_digest(["abc"])}) == 3


def test_jsonl_gives_one_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"body": text}) for text in ("one", "two")))
    assert TextFile(path=path, column="body").documents() == ("one", "two")
    with pytest.raises(CorruptError, match="column 'text'"):
        TextFile(path=path).documents()


def test_empty_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(CorruptError, match="holds no text"):
        TextFile(path=tmp_path / "empty.txt").documents()
    with pytest.raises(NotFoundError, match=r"absent\.txt"):
        TextFile(path=tmp_path / "absent.txt").documents()
