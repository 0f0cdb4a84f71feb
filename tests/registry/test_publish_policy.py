"""What may be published where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import RecipeError
from pipeline.core.values import Licence
from pipeline.registry.package import (
    is_throwaway,
    mark_throwaway,
    publish_faults,
    require_manifest_publishable,
    require_publishable,
)

LLAMA = "LicenseRef-Llama-3.1-Community"
OPEN = Licence(spdx="MIT", redistribution="allowed")
GATED = Licence(
    spdx=LLAMA,
    redistribution="with-notice",
    notice="Built with Llama",
    gated=True,
    read_at="the page of meta-llama/Llama-3.1-8B-Instruct on the Hub",
)


def paths(licence: Licence, *, public: bool = False) -> list[str]:
    return [fault.path for fault in publish_faults(licence, public=public)]


@pytest.mark.parametrize("public", [False, True])
def test_open_weights_may_go_everywhere(public: bool) -> None:
    assert paths(OPEN, public=public) == []


def test_forbidden_redistribution_refuses_public_registries_only() -> None:
    closed = replace(OPEN, redistribution="forbidden")
    assert paths(closed) == []
    assert paths(closed, public=True) == ["registry"]


@pytest.mark.parametrize("public", [False, True])
def test_gated_weights_need_an_acknowledgement_of_their_own_licence(public: bool) -> None:
    wanted = ["source.acknowledge_licence"]
    assert paths(GATED, public=public) == wanted
    assert paths(replace(GATED, acknowledged="MIT"), public=public) == wanted
    assert paths(replace(GATED, acknowledged=LLAMA), public=public) == []


def test_the_message_names_what_to_read_and_which_key_to_set() -> None:
    with pytest.raises(RecipeError) as error:
        require_publishable(GATED, public=False)
    assert GATED.read_at in str(error.value)
    assert f"source.acknowledge_licence={LLAMA}" in str(error.value)


@pytest.mark.parametrize(
    ("random", "redistribution", "public", "throwaway", "allowed"),
    [
        (False, "allowed", True, False, True),
        (False, "with-notice", True, False, True),
        (False, "forbidden", False, False, True),
        (False, "forbidden", True, False, False),
        (True, "allowed", False, False, False),
        (True, "forbidden", False, True, True),
    ],
)
def test_a_sealed_package_goes_where_its_manifest_allows(
    random: bool, redistribution: str, public: bool, throwaway: bool, allowed: bool
) -> None:
    manifest: dict[str, Any] = {
        "source": {"random": random},
        "licence": {"spdx": "MIT", "redistribution": redistribution},
    }
    if allowed:
        require_manifest_publishable(manifest, public=public, throwaway=throwaway)
    else:
        with pytest.raises(RecipeError, match="registry"):
            require_manifest_publishable(manifest, public=public, throwaway=throwaway)


def test_only_a_rehearsals_own_registry_is_marked(tmp_path: Path) -> None:
    assert not is_throwaway(tmp_path)
    mark_throwaway(tmp_path / "new")
    assert is_throwaway(tmp_path / "new")
