"""Licences: what sources say, what the table knows, and what a recipe's own words change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.recipe import WeightSource
from pipeline.core.values import Licence
from pipeline.sources.embedded import EmbeddedSource
from pipeline.sources.hub import HubSource
from pipeline.sources.local import LocalSource
from pipeline.sources.weights import known_licences, licence_of_hub
from tests.sources.tiny_model import tiny_repository

HUB: dict[str, Any] = {"repo_id": "acme/tiny", "revision": "0" * 40, "licence": "MIT"}
EMBEDDED: dict[str, Any] = {
    "package": "p", "requirement": "p==1", "file": "f", "sha256": "0" * 64, "licence": "MIT",
}  # fmt: skip


def sources(**terms: Any) -> list[WeightSource]:
    return [
        HubSource(**HUB, **terms),
        LocalSource(path=Path("x"), licence="MIT", **terms),
        EmbeddedSource(**EMBEDDED, **terms),
    ]


def test_every_source_says_the_same_about_its_terms() -> None:
    for source in sources(redistribution="with-notice", notice="Built with Llama"):
        terms = source.terms
        assert (terms.spdx, terms.redistribution) == ("MIT", "with-notice")
        assert terms.notice == "Built with Llama"
        assert terms.files == ()


def test_fetched_weights_carry_the_terms_and_name_the_files_that_state_them(tmp_path: Path) -> None:
    for name, content in tiny_repository().items():
        if "/" not in name:
            (tmp_path / name).write_bytes(content)
    source = LocalSource(
        path=tmp_path, licence="MIT", redistribution="with-notice", notice="Built with Llama"
    )
    licence = source.fetch().licence
    assert replace(licence, files=()) == source.terms
    assert licence.files == ("LICENSE", "NOTICE.txt", "USE_POLICY.md")


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (HubSource, HUB),
        (LocalSource, {"path": Path("x"), "licence": "MIT"}),
        (EmbeddedSource, EMBEDDED),
    ],
)
def test_licence_that_asks_for_a_notice_needs_one(kind: Any, keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"set source\.notice"):
        kind(**keys, redistribution="with-notice", notice=" \n")


def test_table_of_licences_is_sound() -> None:
    table = known_licences()
    assert {"apache-2.0", "mit", "llama3.1", "llama3.2"} <= set(table)
    for row in table.values():
        terms = Licence(spdx=row.licence, redistribution=row.redistribution, notice=row.notice)
        assert (terms.redistribution == "with-notice") == bool(terms.notice)


@pytest.mark.parametrize(
    ("tag", "licence", "redistribution"),
    [
        ("apache-2.0", "Apache-2.0", "allowed"),
        ("llama3.2", "LicenseRef-Llama-3.2-Community", "with-notice"),
        ("cc-by-nc-4.0", "LicenseRef-cc-by-nc-4.0", "forbidden"),
        (None, "LicenseRef-unstated", "forbidden"),
    ],
)
def test_hub_tag_stands_for_terms(tag: str | None, licence: str, redistribution: str) -> None:
    found = licence_of_hub(tag)
    assert (found.licence, found.redistribution) == (licence, redistribution)
