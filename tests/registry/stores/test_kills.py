"""A publisher that dies at any step of its work shows nothing half, and the rerun completes it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.values import Package
from pipeline.registry.stores.publication import WritableStore
from tests.registry.packages import place_of, raw_statement, read_back, sealed_package
from tests.registry.stores.s3_server import Handler, MemoryS3

STATEMENTS = [raw_statement(model_sig=b"s")]


def publish(store: WritableStore, package: Package) -> None:
    store.put_package(package, STATEMENTS, lambda _: None)


def in_child(work: Callable[[], None]) -> int:
    """Exit code of a process that does the work; 0 if it ended by itself."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_nothing_half(store: WritableStore, package: Package) -> None:
    for place in store.places():
        assert place == place_of(package)
        assert [one.name for one in store.read_statements(place)] == [STATEMENTS[0].name]
        assert len(read_back(store, package)) == 2


def assert_completed(store: WritableStore, package: Package) -> None:
    publish(store, package)
    assert store.places() == [place_of(package)]
    assert_nothing_half(store, package)


@pytest.mark.parametrize("step", range(1, 40, 3))
def test_a_publisher_killed_at_any_step_of_a_folder_shows_nothing_half(
    folder_store: WritableStore, tmp_path: Path, step: int
) -> None:
    package = sealed_package(tmp_path / "package")

    def work() -> None:
        left, fsync = step, os.fsync

        def die(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if not left:
                os._exit(9)
            fsync(descriptor)

        os.fsync = die  # type: ignore[assignment]  # in a child of our own
        publish(folder_store, package)

    assert in_child(work) in {0, 9}
    assert_nothing_half(folder_store, package)
    assert_completed(folder_store, package)


@pytest.mark.parametrize("step", range(1, 22))
def test_a_publisher_killed_before_any_request_to_s3_shows_nothing_half(
    memory_s3_store: WritableStore, memory_s3: MemoryS3, tmp_path: Path, step: int
) -> None:
    package = sealed_package(tmp_path / "package")
    seen: list[str] = []

    def count(handler: Handler) -> bool:
        seen.append(handler.path)
        if len(seen) == step:
            handler.reset()
            os.kill(int(pid.read_text()), 9)
            return True
        return False

    pid = tmp_path / "pid"

    def work() -> None:
        pid.write_text(str(os.getpid()))
        publish(memory_s3_store, package)

    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        memory_s3.fail(method, "", count, times=99)
    assert in_child(work) in {0, -9}
    memory_s3.heal()
    assert_nothing_half(memory_s3_store, package)
    assert_completed(memory_s3_store, package)
