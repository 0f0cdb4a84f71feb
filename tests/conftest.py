"""What no test may take from the machine that it runs on, and which tests run in one worker."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.core.errors import PipelineError

if TYPE_CHECKING:
    from tests.tiny_recipe import Workplace

InChildren = Callable[[Sequence[Callable[[], object]]], list[int]]
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


_IN_ONE_WORKER = ("tests/image/", "tests/formats/trtllm/", "tests/registry/stores/oci/test_image_")
"""What uses a Docker engine: two of them, and all images twice, take longer than one for all."""
_ANYWHERE = ("tests/hostile/", "tests/rehearse/")
"""Files of long tests that share nothing dear."""


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadscope`, tests that share a dear fixture run in one worker: see above.

    xdist's groups (`loadgroup`) are without effect under pytest 9.2, whose nodes have no `_nodeid`.
    """
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByPlace(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(_IN_ONE_WORKER):
                return "docker"
            return nodeid if nodeid.startswith(_ANYWHERE) else nodeid.partition("::")[0]

    return ByPlace(config, log)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A place after one good build; tests only read it."""
    from tests.tiny_recipe import make_workplace

    place = make_workplace(tmp_path_factory.mktemp("built") / "place")
    done = place.build()
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="session")
def built_checkpoint(built: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A place after one good build of `QUICK`, which took its stages from the other's cache."""
    from tests.tiny_recipe import QUICK

    place = built.copy(tmp_path_factory.mktemp("checkpoint") / "place", packages=False)
    done = place.build(*QUICK)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def in_children() -> InChildren:
    """Run functions at the same moment, each in a process of its own.

    Returns what each process ended with: 0, the exit code of its error, or minus its signal.
    """

    def run(jobs: Sequence[Callable[[], object]]) -> list[int]:
        start_read, start_write = os.pipe()
        pids = []
        for job in jobs:
            pid = os.fork()
            if pid == 0:
                code = 99
                try:
                    logging.disable()
                    os.close(start_write)
                    os.read(start_read, 1)  # returns when the parent closes its end
                    job()
                    code = 0
                except PipelineError as error:
                    code = error.exit_code
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            pids.append(pid)
        os.close(start_read)
        os.close(start_write)
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

    return run
