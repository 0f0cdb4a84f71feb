"""A signature that comes later than its package, or never."""

from __future__ import annotations

import threading

import pytest

from pipeline.core.errors import UntrustedError
from pipeline.registry.client import pull
from pipeline.registry.client.layout import verify_layout
from pipeline.registry.package import verify
from pipeline.registry.signing.signer import build_statements
from pipeline.registry.stores.store import Place
from tests.registry.client.conftest import Shop
from tests.registry.client.faulty_store import FaultyStore
from tests.registry.signing.conftest import RUN


def test_a_signature_that_comes_later_is_waited_for(shop: Shop) -> None:
    reference = shop.publish(signed=False)
    place = Place.of(reference)
    package = verify(shop.store.location(place))  # type: ignore[attr-defined]
    came = threading.Event()

    def sign() -> None:
        for name, files in build_statements(package, shop.key, RUN).items():
            shop.store.put_statement(place, name, files)
        came.set()

    later = threading.Timer(1.5, sign)
    later.start()
    try:
        shop.pull(store=FaultyStore(store=shop.store, local=False))
    finally:
        later.join()
    assert came.is_set()
    assert verify_layout(shop.to).digest == reference.digest


def test_the_wait_for_a_signature_ends_and_nothing_is_taken(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "_SIGNATURE_WAIT_S", 1.5)
    shop.publish(signed=False)
    with pytest.raises(UntrustedError):
        shop.pull(store=FaultyStore(store=shop.store, local=False))
    assert shop.left() == []
