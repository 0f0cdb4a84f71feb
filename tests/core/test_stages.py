"""Stages: what makes a kept result out of date."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipeline.core import cache
from pipeline.core.cache import Stage, code_digest
from tests.tiny_recipe import ROOT, run_python

CODE = '''\
"""What it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import json as parser

LIMIT = 3
"""How much."""


class Kept:
    """A class."""

    def scale(self, x: float) -> str:
        from math import floor

        return f"{floor(x):>{LIMIT}} {x=}"


def half(x: float) -> float:  # for now
    return x / 2
'''

Digest = Callable[..., str]


@pytest.fixture
def digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Digest:
    """Digest of a package with the given modules."""
    monkeypatch.syspath_prepend(tmp_path)

    def digest(**modules: str) -> str:
        package = tmp_path / "staged"
        package.mkdir(exist_ok=True)
        for old in package.glob("*.py"):
            old.unlink()
        for name, text in {"__init__": "", **modules}.items():
            (package / f"{name}.py").write_text(text)
        code_digest.cache_clear()
        cache._parse.cache_clear()
        return code_digest(("staged",))

    return digest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# for now", "# measured 2026-11-24"),
        ('"""How much."""', '"""How much [datasheet]."""'),
        ('    """A class."""\n\n', ""),
        ("x / 2", "(\n        x / 2\n    )"),
        ("import TYPE_CHECKING\n", "import TYPE_CHECKING, Any\n"),
        ("LIMIT = 3", "if TYPE_CHECKING:\n    import torch\nLIMIT = 3"),
    ],
)
def test_comments_docstrings_layout_and_plain_imports_do_not_count(
    digest: Digest, old: str, new: str
) -> None:
    assert digest(one=CODE.replace(old, new)) == digest(one=CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ("x / 2", "x / 3"),
        ("{x=}", "{x}"),
        (":>{LIMIT}", ":<{LIMIT}"),
        ("import floor", "import ceil as floor"),
        ("def half", "def halve"),
    ],
)
def test_what_the_code_does_counts(digest: Digest, old: str, new: str) -> None:
    assert digest(one=CODE.replace(old, new)) != digest(one=CODE)


def test_class_may_move_between_the_modules_of_a_stage(digest: Digest) -> None:
    head, _, rest = CODE.partition("class Kept:")
    kept, _, half = rest.partition("def half")
    moved = f'"""New."""\n\nfrom staged.one import LIMIT\n\n\nclass Kept:{kept}'
    assert digest(one=f"{head}def half{half}", two=moved) == digest(one=CODE)


def test_digest_is_the_same_on_every_version_of_python(digest: Digest) -> None:
    assert digest(one=CODE) == "84c22e78c9d47c98"


def test_digest_imports_nothing_of_the_code() -> None:
    code = (
        "import sys; from pipeline.core.cache import code_digest;"
        "code_digest(('pipeline.quant.simulate',));"
        "print([m for m in ('torch', 'pipeline.quant.simulate') if m in sys.modules])"
    )
    assert run_python(ROOT, "-c", code).stdout.strip() == "[]"


def test_unrecorded_code_is_part_of_the_key_and_recorded_code_is_not(
    digest: Digest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "stages.yaml"
    monkeypatch.setattr(cache, "RECORD_FILE", record)
    stage = Stage(name="toy", version=1, code=("staged",))

    def identity(text: str) -> dict[str, object]:
        digest(one=text)
        cache._records.cache_clear()
        return stage.identity

    record.write_text("")
    assert identity(CODE)["code"] == stage.digest
    record.write_text(yaml.safe_dump({"toy": stage.record}))
    assert identity(CODE) == {"stage": "toy", "version": 1}
    edited = identity(CODE.replace("x / 2", "x / 3"))
    assert edited["code"] == stage.digest
    assert Stage(name="toy", version=2, code=("staged",)).identity["code"], "raised, not recorded"
    monkeypatch.undo()
    cache._records.cache_clear()
