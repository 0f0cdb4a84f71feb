"""What no test may take from the machine that it runs on, and which tests must not run at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

_OF_THE_MACHINE = (
    "CI",  # with it every build would want a key from the environment
    "ENGINESMITH_POLICY",
    "ENGINESMITH_SIGNING_KEY",
    "ENGINESMITH_SIGNING_KEY_PEM",
    "GITHUB_ACTIONS",
)


@pytest.fixture(scope="session", autouse=True)
def _own_configuration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A configuration folder of the tests' own, also for the processes that they start."""
    folder = tmp_path_factory.mktemp("configuration")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ENGINESMITH_CONFIG", str(folder))
        for name in _OF_THE_MACHINE:
            patched.delenv(name, raising=False)
        yield folder


@pytest.fixture(autouse=True)
def _no_handler_outlives_its_test() -> Iterator[None]:
    """A library that sets up the root logger in one test must not speak in the next ones."""
    yield
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups for `--dist loadgroup`: all that starts servers together, the rest by its file.

    Two Docker engines at once, or one build of the main job in each of two workers, take longer
    than one after the other.
    """
    for item in items:
        served = item.get_closest_marker("services") is not None
        group = "services" if served else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
