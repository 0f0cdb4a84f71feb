"""verify, of references, of pulled folders and of folders in a registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.errors import UntrustedError
from tests.registry.client.conftest import Shop


def published_folder(shop: Shop) -> Path:
    (manifest,) = Path(shop.store.url).rglob("manifest.json")
    return manifest.parent


def test_a_reference_a_pulled_folder_and_a_published_folder_verify_alike(shop: Shop) -> None:
    reference = shop.publish()
    shop.pull()
    for target, registry in (
        ("tiny", shop.store.url),
        (shop.to, None),
        (published_folder(shop), None),
    ):
        done = shop.verify(target, registry=registry)
        assert done.digest == reference.digest
        assert done.chosen.proof.kind == "proven"


def test_a_yank_after_the_pull_shows_where_the_registry_is_asked(shop: Shop) -> None:
    reference = shop.publish()
    shop.pull()
    shop.yank(reference)
    shop.verify(shop.to)
    for target in (shop.to, f"tiny@sha256:{reference.digest}"):
        with pytest.raises(UntrustedError, match="yanked by ada"):
            shop.verify(target, registry=shop.store.url)
        assert shop.verify(target, registry=shop.store.url, allow_yanked=True).digest
    with pytest.raises(UntrustedError, match="yanked by ada"):
        shop.verify(published_folder(shop))
