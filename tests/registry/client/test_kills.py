"""Publish and pull, killed at seeded moments, on every kind of registry."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.values import Package
from pipeline.registry.client.download import files_of
from pipeline.registry.client.layout import verify_layout
from pipeline.registry.reference import reference_of
from pipeline.registry.signing.signer import build_statements
from pipeline.registry.stores.oci import image
from pipeline.registry.stores.opening import open_store
from pipeline.registry.stores.store import Place, Store
from tests.registry.backends import backends
from tests.registry.client.conftest import PIECE_BYTES, Shop, engine_files, noise
from tests.registry.client.faulty_store import FaultyStore
from tests.registry.client.kills import killed_after, points
from tests.registry.signing.conftest import RUN

ShopOf = Callable[[str], Shop]

_LARGE_BYTES = 2 << 20


def _assert_whole(store: Store, package: Package) -> None:
    place = Place.of(reference_of(package))
    assert store.read_manifest(place) == (package.dir / "manifest.json").read_bytes()
    for file in files_of(package.manifest):
        with store.open_file(place, file) as chunks:
            assert b"".join(chunks) == (package.dir / file.path).read_bytes()


@pytest.mark.parametrize("backend", backends)
def test_a_publisher_killed_at_any_moment_shows_nothing_half_and_the_rerun_completes(
    shop_of: ShopOf, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "LARGE_BYTES", _LARGE_BYTES)
    shop = shop_of(backend)
    url = shop.store.url

    def sealed(number: int) -> tuple[Package, dict[str, dict[str, bytes]]]:
        files = {f"shard-{one}": noise(1 << 10, number) * (_LARGE_BYTES >> 10) for one in range(2)}
        files["config.json"] = noise(700, number)
        folder = shop.home / f"package-{number}"
        folder.mkdir()
        label = shop.bench.label(f"{number}.0")
        package: Package = shop.bench.seal(folder, shop.engine(files=files), label)
        return package, build_statements(package, shop.key, RUN)

    def publish(package: Package, statements: Any) -> None:
        open_store(url).put_package(package, statements, lambda count: None)

    first = sealed(1)
    started = time.monotonic()
    publish(*first)
    whole_s = time.monotonic() - started
    dice = random.Random(20261125)
    killed = 0
    for number in range(2, 2 + points(4)):
        package, statements = sealed(number)
        place = Place.of(reference_of(package))
        moment_s = dice.uniform(0.0, 1.1) * whole_s
        killed += killed_after(partial(publish, package, statements), moment_s)
        reader = open_store(url)
        if place.version in reader.versions(place.name, place.variant):
            _assert_whole(reader, package)
            assert {one.name for one in reader.statements(place)} == set(statements)
        publish(package, statements)
        _assert_whole(open_store(url), package)
        to = shop.home / f"to-{number}"
        got = shop.pull(f"tiny:{place.version}", store=open_store(url), to=to, accept_unproven=True)
        assert got.digest == package.digest
        assert verify_layout(to).digest == package.digest
        for folder in (to, package.dir):
            shutil.rmtree(folder)
    assert killed


def _throttled(chunks: Any, file: Any, offset: int) -> Any:
    for chunk in chunks:
        for start in range(0, len(chunk), 1024):
            time.sleep(0.0005)
            yield chunk[start : start + 1024]


@pytest.mark.parametrize("backend", [one for one in backends if one != "folder"])
@pytest.mark.parametrize("through_cache", [True, False])
def test_a_puller_killed_at_any_moment_shows_nothing_half_and_the_rerun_completes(
    shop_of: ShopOf,
    backend: str,
    through_cache: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same on a folder: `test_concurrent`."""
    monkeypatch.setattr(image, "LARGE_BYTES", 12 * PIECE_BYTES)
    shop = shop_of(backend)
    engine = shop.engine(files={f"shard-{n}": noise(12 * PIECE_BYTES + n, n) for n in range(2)})
    reference = shop.publish(engine)
    wanted = {path.name: path.read_bytes() for path in engine.dir.iterdir()}

    def pull() -> None:
        store = FaultyStore(store=open_store(shop.store.url), always=_throttled, local=False)
        shop.pull(store=store, through_cache=through_cache)

    started = time.monotonic()
    pull()
    whole_s = time.monotonic() - started
    dice = random.Random(7)
    killed = 0
    for _ in range(points(4)):
        shutil.rmtree(shop.to.parent)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        for _ in range(dice.randint(1, 3)):
            killed += killed_after(pull, dice.uniform(0.0, 1.1) * whole_s)
            if shop.to.exists():
                assert verify_layout(shop.to).digest == reference.digest
        pull()
        got = engine_files(shop.to)
        got.pop("model.sig", None)
        assert got == wanted
        assert verify_layout(shop.to).digest == reference.digest
        assert shop.left() == ["tiny"]
    assert killed
