"""SIGKILL at seeded steps of publishing and pulling; `make test-soak` has more of them."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from pipeline.core.published import Package
from pipeline.registry.client.deliver import verify_layout
from pipeline.registry.stores.publication import WritableStore
from tests.registry.client.conftest import CHUNK_BYTES, Shop, engine_files, hurry, noise
from tests.registry.client.kills import counted_steps, killed_at, seeded_steps
from tests.registry.packages import place_of, raw_statement, read_back, sealed_package

SIGNATURE = raw_statement(model_sig=b"s")
SERVERS = [
    pytest.param("seaweed", 3, marks=pytest.mark.services),
    pytest.param("docker_registry", 3, marks=pytest.mark.services),
]


def _publish(store: WritableStore, package: Package) -> None:
    store.put_package(package, [SIGNATURE], lambda _: None)


def _assert_whole(store: WritableStore, package: Package) -> None:
    for file, data in read_back(store, package).items():
        assert data == (package.dir / file).read_bytes()
    assert [one.name for one in store.read_statements(place_of(package))] == [SIGNATURE.name]


@pytest.mark.parametrize(
    ("kind", "few"), [("folder", 14), ("memory_s3", 8), ("memory_oci", 8), *SERVERS]
)
def test_a_killed_publisher_shows_nothing_half_and_the_rerun_completes(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, few: int
) -> None:
    store: WritableStore = request.getfixturevalue(f"{kind}_store")

    def made(number: int) -> Package:
        files = {"a.plan": noise(1 << 20, number), "b.plan": b"2"}
        return sealed_package(tmp_path / f"{number}", files)

    _publish(store, made(0))  # begins the registry, too
    with counted_steps() as steps:
        _publish(store, made(1))
    killed = 0
    for number, step in enumerate(seeded_steps(len(steps), few)):
        package = made(2 + number)
        killed += killed_at(partial(_publish, store, package), step)
        if place_of(package) in store.places():
            _assert_whole(store, package)
        _publish(store, package)
        _assert_whole(store, package)
    assert killed


@pytest.mark.parametrize(("kind", "few"), SERVERS)
def test_a_killed_puller_leaves_nothing_half_and_the_rerun_completes(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    few: int,
) -> None:
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    hurry(monkeypatch)
    (tmp_path / "home").mkdir()
    shop = Shop(store=request.getfixturevalue(f"{kind}_store"), home=tmp_path / "home")
    wanted = {f"shard-{number}": noise(12 * CHUNK_BYTES + number, number) for number in range(2)}
    reference = shop.publish(wanted)
    shop.pull()  # remembers statements, too
    shutil.rmtree(shop.to.parent)
    with counted_steps() as steps:
        shop.pull()
    killed = 0
    for step in seeded_steps(len(steps), few):
        shutil.rmtree(shop.to.parent)
        killed += killed_at(shop.pull, step)
        if shop.to.exists():
            assert verify_layout(shop.to).digest == reference.digest
        shop.pull()
        assert engine_files(shop.to) == wanted
        assert shop.left() == ["tiny"]
    assert killed
