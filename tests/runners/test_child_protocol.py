"""Frames to and from a child process, and every way in which it can end or misbehave."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import (
    CorruptError,
    ExitCode,
    IncompatibleError,
    OutOfMemoryError,
    PipelineError,
    ToolError,
)
from pipeline.core.process import Started
from pipeline.runners.child import CHILDREN, ChildSession, Program, open_child
from pipeline.runners.children.main import pack
from tests.runners import toy_model
from tests.runners.toy_model import VOCAB, continued

PLAIN = (sys.executable, "-I", "-S", str(CHILDREN / "main.py"))
"""Without site packages: a child needs the standard library only."""


@contextlib.contextmanager
def session(
    fault: str = "", answer_s: float = 30.0, command: tuple[str, ...] = PLAIN, **more: Any
) -> Iterator[ChildSession]:
    program = Program(
        name="Toy",
        model=str(toy_model.__file__),
        arguments={"fault": fault, **more},
        load_s=answer_s,
        answer_s=answer_s,
        start=lambda: contextlib.nullcontext(Started(command=command)),
    )
    with open_child(program) as opened:
        yield opened


def ended(pid: int) -> bool:
    """Whether no process of that number runs any more; it may wait to be reaped by init."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state in "ZX"
    return True


def test_child_answers_without_anything_of_this_project(temporary: Path) -> None:
    with session() as opened:
        logits = opened.logits([5, 3, 9])
        assert logits.shape == (3, VOCAB)
        assert logits.dtype == np.float32
        assert logits.argmax(axis=-1).tolist()[-1:] == continued([5, 3, 9], 1)
        made = opened.generate([[1, 2], [3]], 4)
        assert made.tokens.tolist() == [continued([1, 2], 4), continued([3], 4)]
        assert (made.ttft_s, made.total_s, made.lengths) == (0.5, 1.0, None)
        assert list(opened.stream([4], 5, frozenset())) == continued([4], 5)
    assert list(temporary.iterdir()) == []


def use(where: str, fault: str, answer_s: float = 30.0) -> None:
    with session(fault, answer_s) as opened:
        if where == "stream":
            list(opened.stream([1], 5, frozenset()))
        opened.generate([[1]], 2)
        opened.logits([1])


@pytest.mark.parametrize("where", ["load", "generate", "stream", "logits"])
def test_child_that_dies_is_an_error_with_the_end_of_its_log(where: str, temporary: Path) -> None:
    with pytest.raises(ToolError, match="the last words") as caught:
        use(where, f"die-{where}")
    assert caught.value.returncode == 17
    assert list(temporary.iterdir()) == [caught.value.log_path]


@pytest.mark.parametrize("where", ["load", "generate", "stream"])
def test_silent_child_is_ended_and_the_error_names_the_setting(where: str) -> None:
    with pytest.raises(ToolError, match=r"raise runner\.(load|answer)_timeout_s") as caught:
        use(where, f"hang-{where}", answer_s=1.0)
    assert caught.value.returncode == -signal.SIGTERM


def test_child_that_writes_past_the_protocol_is_ended() -> None:
    with pytest.raises(ToolError, match="where a frame begins"):
        use("generate", "garbage-generate")


def test_greeting_before_the_first_frame_goes_to_the_log(tmp_path: Path) -> None:
    greeting = ("/bin/sh", "-c", 'echo "== an image greets =="; exec "$0" "$@"', *PLAIN)
    with pytest.raises(ToolError) as caught, session("die-generate", command=greeting) as opened:
        opened.generate([[1]], 1)
    assert "an image greets" in caught.value.log_path.read_text()


def test_program_that_never_writes_a_frame_is_an_error() -> None:
    with pytest.raises(ToolError, match="where a frame begins"), session(command=("yes",)):
        pass
    with (
        pytest.raises(ToolError, match=r"load_timeout_s"),
        session(command=("sleep", "60"), answer_s=1.0),
    ):
        pass


@pytest.mark.parametrize("where", ["load", "generate"])
@pytest.mark.parametrize(
    ("fault", "error", "code", "shown"),
    [
        ("corrupt", CorruptError, ExitCode.CORRUPT, "Toy failed: the file is cut; see"),
        ("incompatible", IncompatibleError, ExitCode.INCOMPATIBLE, "another card"),
        ("memory", OutOfMemoryError, ExitCode.INCOMPATIBLE, "take a smaller batch or context"),
        ("logged", OutOfMemoryError, ExitCode.INCOMPATIBLE, "Engine core initialization failed"),
        ("value", PipelineError, ExitCode.FAILED, "ValueError: longer than the context"),
    ],
)
def test_error_of_the_child_comes_back_as_itself(
    where: str, fault: str, error: type[PipelineError], code: ExitCode, shown: str
) -> None:
    with pytest.raises(error, match=re.escape(shown)) as caught:
        use(where, f"{fault}-{where}")
    assert type(caught.value) is error
    assert caught.value.exit_code is code
    log_path = Path(str(caught.value).rpartition("see ")[2])
    assert "Traceback" in log_path.read_text()


@pytest.mark.parametrize(
    ("ask", "error", "shown"),
    [
        (lambda one: one.logits([1, 2, 3]), PipelineError, "logits of 3 positions, got 2"),
        (lambda one: one.generate([[1], [2]], 4), PipelineError, "4 tokens of request 0, got 3"),
    ],
)
def test_fewer_answers_than_asked_for_are_refused(
    ask: Callable[[ChildSession], object], error: type[PipelineError], shown: str
) -> None:
    with pytest.raises(error, match=shown), session("short") as opened:
        ask(opened)


def test_logits_that_are_not_finite_are_never_an_answer() -> None:
    with pytest.raises(CorruptError, match="not finite at 1 of 3 positions"):  # noqa: SIM117
        with session("nan") as opened:
            opened.logits([1, 2, 3])


@pytest.mark.parametrize("fault", ["grandchild-load", "grandchild-generate"])
def test_what_the_child_started_ends_with_it(fault: str) -> None:
    """Also a process that ignores SIGTERM."""
    with session(fault) as opened:
        opened.generate([[1]], 1)
        found = re.search(r"grandchild (\d+)", opened.log_path.read_text())
    assert found is not None
    deadline = time.monotonic() + 5
    while not ended(int(found[1])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended(int(found[1]))


def test_nothing_stays_after_an_error_of_the_caller(temporary: Path) -> None:
    with pytest.raises(ZeroDivisionError), session() as opened:
        1 / len(opened.generate([[1]], 1).tokens[1:])
    assert opened._process.poll() is not None
    assert list(temporary.iterdir()) == []


def test_child_whose_caller_was_killed_ends_with_its_group() -> None:
    """A caller that was killed cannot end anything: the child has to notice."""
    process = subprocess.Popen(
        PLAIN,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    order = {"kind": "load", "model": str(toy_model.__file__), "paths": [], "arguments": {}}
    process.stdin.write(pack(order))
    process.stdin.flush()
    assert b"ready" in os.read(process.stdout.fileno(), 4096)
    process.stdin.close()
    assert process.wait(10) == -signal.SIGKILL
    process.stdout.close()
