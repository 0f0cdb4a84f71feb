"""A version goes while somebody pulls it: pullers have no lease, so that is an error."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import pytest

from pipeline.core.errors import NotFoundError
from pipeline.registry.stores.store import Place
from tests.registry.client.conftest import Shop


class _Collected:
    """A store whose version is removed when its second file is asked for."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def open_file(self, place: Place, file: Any, *more: Any) -> AbstractContextManager[Any]:
        self._asked.add(file.path)
        if len(self._asked) == 2:
            self._store.delete_version(place)
        opened: AbstractContextManager[Any] = self._store.open_file(place, file, *more)
        return opened


def test_a_version_that_is_removed_under_a_puller_is_an_error_and_nothing_is_left(
    shop: Shop,
) -> None:
    reference = shop.publish()
    store: Any = _Collected(shop.store)
    pulling = dataclasses.replace(shop, store=store)
    with pytest.raises(
        NotFoundError, match=r"was removed from .* while it was fetched; pull again"
    ):
        pulling.pull()
    assert not shop.to.exists()
    assert shop.left() == []
    assert Place.of(reference).version not in shop.store.versions("tiny", reference.variant)
