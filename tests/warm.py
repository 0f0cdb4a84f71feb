"""Commands in processes of their own that need not import PyTorch first.

Importing PyTorch, Transformers and ModelOpt takes a tiny build longer than building. So a process
per test worker imports them once and forks for every command: environment, folder, output and
memory are a command's own as in a new process; only the imports of other people's packages are
shared. `python -m tests.warm` is that process: JSON lines in, exit codes out.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_IMPORTS = (
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "modelopt.torch.quantization",
    "modelopt.torch.export",
    "onnx",
    "onnxruntime",
    "matplotlib.figure",
)
_NOT_SHARED = "pynvml"
"""Tests put one of their own on the path."""


def run_warm(
    arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """`enginesmith ARGUMENTS`, as `subprocess.run` would.

    Raises:
        subprocess.TimeoutExpired: It was killed, and the process that forks with it.
    """
    with tempfile.TemporaryDirectory(prefix="warm-") as name:
        out, err = Path(name, "out"), Path(name, "err")
        request = {"argv": [*arguments], "cwd": str(cwd), "env": dict(env)}
        code = _server().ask({**request, "out": str(out), "err": str(err)}, timeout_s)
        return subprocess.CompletedProcess(
            ["enginesmith", *arguments], code, out.read_text(), err.read_text()
        )


class _Server:
    """The process that forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, Any], timeout_s: float) -> int:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], timeout_s)
        if not ready:
            process.kill()
            _server.cache_clear()
            raise subprocess.TimeoutExpired(request["argv"], timeout_s)
        return int(process.stdout.readline())


@functools.cache
def _server() -> _Server:
    return _Server()


def _serve() -> None:
    """Fork for every line until standard input ends, that is until the tests do."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints
    for name in _IMPORTS:
        importlib.import_module(name)
    sys.modules.pop(_NOT_SHARED, None)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


def _become(request: dict[str, Any]) -> None:
    """Run the command; does not return."""
    code: object = 1
    try:
        for number, target in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(target, flags, 0o600), number)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        path = [p for p in request["env"].get("PYTHONPATH", "").split(os.pathsep) if p]
        sys.path[:0] = path
        importlib.import_module("pipeline.runners").__path__.extend(
            str(Path(p, "runners")) for p in path if Path(p, "runners").is_dir()
        )
        sys.argv = ["enginesmith", *request["argv"]]
        runpy.run_module("pipeline.cli", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    _serve()
