from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipeline.formats.trtllm.container import is_stale, owner_of
from tests.formats.trtllm.containers.users import run_as


def test_living_process_owns_its_container() -> None:
    assert not is_stale(owner_of(os.getpid()))


def test_container_of_an_ended_process_is_stale() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = owner_of(process.pid)
    assert not is_stale(owner)
    process.communicate(b"\n")
    assert is_stale(owner)


def test_process_with_a_used_id_does_not_own_what_the_former_left() -> None:
    namespace, pid, start = owner_of(os.getpid()).split()
    assert is_stale(f"{namespace} {pid} {int(start) - 1}")


def test_process_of_another_namespace_cannot_be_judged() -> None:
    assert not is_stale(f"pid:[1] {2**22 + 1} 1")


@pytest.mark.services  # needs root, as they do
def test_process_of_another_user_cannot_be_judged() -> None:
    namespace, pid, start = owner_of(os.getpid()).split()
    owner = f"{namespace} {pid} {int(start) - 1}"

    def judge() -> None:
        assert not is_stale(owner)

    assert is_stale(owner)
    assert run_as(12345, [], judge) == ""
