from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.core import launch
from pipeline.core.errors import ToolError
from pipeline.core.process import last_lines, run_tool

ROOT = Path(__file__).parents[2]
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(60)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which nobody may have reaped yet, does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition: object, seconds: float = 10.0) -> bool:
    """Whether `condition()` becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if callable(condition) and condition():
            return True
        time.sleep(0.02)
    return False


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def test_output_of_both_streams_is_kept_after_the_command_line(tmp_path: Path) -> None:
    log_path = tmp_path / "logs" / "tool.log"
    code = "import os; os.write(1, b'out\\n'); os.write(2, os.environb[b'ADDED'])"
    for word in ("first", "second"):
        run_tool(python(code), stage="s", log_path=log_path, env={"ADDED": f"{word}\n"})
    lines = log_path.read_text().splitlines()
    assert lines[0].startswith("$ [")
    assert [line for line in lines if line[0] != "$"] == ["out", "first", "out", "second"]


def test_failure_carries_exit_code_log_and_last_lines(tmp_path: Path) -> None:
    with pytest.raises(ToolError) as caught:
        run_tool(
            python("import sys; print('the cause'); sys.exit(3)"),
            stage="compile",
            log_path=tmp_path / "log",
        )
    assert caught.value.returncode == 3
    message = str(caught.value)
    assert message.startswith("compile: ")
    assert str(tmp_path / "log") in message
    assert message.endswith("    the cause")


def test_timeout_ends_the_whole_group(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(ToolError, match="it was stopped after 1 s"):
        run_tool(python(PARENT, str(pid_file)), stage="s", log_path=tmp_path / "log", timeout_s=1.0)
    grandchild = int(pid_file.read_text())
    assert wait_for(lambda: not alive(grandchild))


def test_what_a_finished_tool_left_running_is_ended(tmp_path: Path) -> None:
    code = PARENT.rsplit("time.sleep(60)", 1)[0]
    run_tool(python(code, str(tmp_path / "pid")), stage="s", log_path=tmp_path / "log")
    grandchild = int((tmp_path / "pid").read_text())
    assert wait_for(lambda: not alive(grandchild))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_ends_the_whole_group_and_sigkill_of_the_caller_the_tool(
    tmp_path: Path, number: signal.Signals
) -> None:
    pid_file = tmp_path / "pid"
    own = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    command = python(PARENT if number == signal.SIGINT else own, str(pid_file))
    caller = f"""
from pathlib import Path
from pipeline.core.process import run_tool
run_tool({command!r}, stage="s", log_path=Path({str(tmp_path / "log")!r}))
"""
    process = subprocess.Popen(python(caller), cwd=ROOT, stderr=subprocess.PIPE)
    assert wait_for(lambda: pid_file.exists() and pid_file.read_text())
    tool = int(pid_file.read_text())
    assert alive(tool)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert (b"KeyboardInterrupt" in stderr) is (number == signal.SIGINT)
    assert wait_for(lambda: not alive(tool))


def test_tool_of_a_caller_that_is_gone_already_does_not_start(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mark = tmp_path / "mark"
    command = [sys.executable, "-I", "-S", launch.__file__, str(gone.pid), "touch", str(mark)]
    assert subprocess.run(command, check=False).returncode == 128 + signal.SIGKILL
    assert not mark.exists()


def test_tool_starts_with_the_signals_of_a_shell(tmp_path: Path) -> None:
    # Bit n-1 of SigIgn is signal n; Python itself ignores SIGPIPE.
    run_tool(["grep", "SigIgn", "/proc/self/status"], stage="s", log_path=tmp_path / "log")
    ignored = int(last_lines(tmp_path / "log")[-1].split()[1], 16)
    assert not ignored & (1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1))


def test_missing_program_is_a_failed_tool(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="cannot start nosuch-program: No such file"):
        run_tool(["nosuch-program"], stage="s", log_path=tmp_path / "log")
