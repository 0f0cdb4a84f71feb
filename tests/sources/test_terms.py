"""Licences: what sources say, what the table knows, and what a recipe's own words change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.sources.embedded import EmbeddedSource
from pipeline.sources.hub import HubSource
from pipeline.sources.local import LocalSource
from pipeline.sources.weights import known_licences, licence_of_hub

HUB: dict[str, Any] = {"repo_id": "acme/tiny", "revision": "0" * 40, "licence": "MIT"}
EMBEDDED: dict[str, Any] = {
    "package": "p", "requirement": "p==1", "file": "f", "sha256": "0" * 64, "licence": "MIT",
}  # fmt: skip


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
    for terms in table.values():
        assert (terms.redistribution == "with-notice") == bool(terms.notice)
    assert licence_of_hub("unheard-of").redistribution == "forbidden"
