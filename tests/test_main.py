"""A run ends with one outcome, told by exit code, verdict.json, `$GITHUB_OUTPUT` and the screen."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.__main__ import Request, main, run
from pipeline.answer import screen_logging
from pipeline.config.recipe import Recipe
from pipeline.core.errors import ExitCode, Fault, NotFoundError, RecipeError, ToolError
from pipeline.outcome import Outcome, failure_of
from pipeline.run_log import file_logging
from tests.tiny_recipe import enginesmith

RECIPE = """
defaults: [smollm2, _self_]
name: toy
registry: {path: packages}
"""

PUBLISHED = Outcome(
    exit_code=ExitCode.OK,
    message="Published",
    verdict="checked",
    reference="toy/any:1-abc",
    digest="d" * 64,
    report=Path("report.json"),
    package_dir=Path("packages/toy/any/1-abc"),
    size_bytes=142_300_000,
)


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, and the current directory."""
    monkeypatch.delenv("GITHUB_OUTPUT", raising=False)
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    (own / "toy.yaml").write_text(RECIPE)
    return tmp_path


def run_toy(work: Any, *overrides: str) -> ExitCode:
    """Run a job whose build is `work`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.build.build", work)
        return run(Request(recipe="toy", overrides=overrides, config_dir=Path("own")))


def verdict(registry: str = "packages") -> dict[str, Any]:
    document: dict[str, Any] = json.loads(
        Path(registry, ".runs", "latest", "verdict.json").read_text()
    )
    return document


def never(recipe: Recipe, run_dir: Path, **more: Any) -> Outcome:
    raise AssertionError("nothing may be started")


def test_good_job_gets_typed_recipe_and_tells_its_outcome(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[Any] = []

    def work(recipe: Recipe, run_dir: Path, **more: Any) -> Outcome:
        logging.getLogger("pipeline.toy").debug("a detail")
        seen.extend([recipe, more["config"]["acceptance"]["repeats"], run_dir, more["rebuild"]])
        return PUBLISHED

    assert run_toy(work, "acceptance.repeats=7") == 0
    recipe, size, run_dir, rebuild = seen
    assert (recipe.name, recipe.acceptance.repeats) == ("toy", 7)
    assert (size, rebuild) == (7, False)
    assert "a detail" in (run_dir / "build.log").read_text()
    found = verdict()
    assert found["exit_code"] == 0
    assert found["overrides"] == ["acceptance.repeats=7"]
    assert (found["verdict"], found["reference"]) == ("checked", "toy/any:1-abc")
    assert found["digest"] == "d" * 64
    assert Path(found["report"]).is_absolute()
    shown, errors = capsys.readouterr()
    assert "a detail" not in errors
    last = shown.splitlines()[-7:]
    assert [line.split()[0] for line in last] == [
        "verdict", "size", "digest", "package", "path", "report", "try"
    ]  # fmt: skip
    assert "142.3 MB" in last[1]
    assert "generate toy/any:1-abc --registry packages" in last[-1]


def raising(error: BaseException) -> Any:
    def work(recipe: Recipe, run_dir: Path, **more: Any) -> Outcome:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (NotFoundError("no such commit"), 7, "no such commit"),
        (RecipeError([Fault("shape", "differs")]), 2, "shape: differs"),
        (
            ToolError(stage="compile", command=["rtx"], returncode=-9, log_path=Path("x.log")),
            1,
            "x.log",
        ),
        (OSError(errno.ENOSPC, "No space left", "/cache/x"), 9, "disk full at /cache/x"),
        (OSError(errno.EDQUOT, "Quota", "/cache/x"), 9, "disk full at /cache/x"),
        (OSError(errno.EROFS, "Read-only file system", "/cache/x"), 1, "/cache/x: Read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/w"), 1, "/w: Permission denied"),
    ],
)
def test_understood_failure_is_one_message_without_traceback(
    error: Exception, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_toy(raising(error)) == code
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert verdict()["exit_code"] == code
    assert message in verdict()["message"]


@pytest.mark.parametrize("error", [KeyError("oops"), SystemExit(0)])
def test_bug_keeps_its_traceback_and_fails(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_toy(raising(error)) == 1
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert "in work" in errors
    log = next(Path("packages/.runs/latest").glob("build.log")).read_text()
    assert "Traceback" in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_cleans_up_and_exits_130_with_a_verdict(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def work(recipe: Recipe, run_dir: Path, **more: Any) -> Outcome:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            cleaned.append(True)
        return PUBLISHED

    before = signal.getsignal(number)
    assert run_toy(work) == 130
    assert cleaned
    assert verdict()["exit_code"] == 130
    assert capsys.readouterr().err == "error: stopped before it was done\n"
    assert signal.getsignal(number) is before


def test_unwritable_registry_fails_at_once_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], workdir: Path
) -> None:
    (workdir / "packages").write_text("a file")
    before = sorted(workdir.rglob("*"))
    started = time.perf_counter()
    assert run_toy(never) == 1
    assert time.perf_counter() - started < 1
    assert "cannot write or read packages" in capsys.readouterr().err
    assert sorted(workdir.rglob("*")) == before
    assert run_toy(never, "acceptance.repeats=0") == 2, "faults count more"


def test_composed_recipe_is_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["-cn", "smollm2", "--cfg", "job", "compiler.max_seq_len=512"]) is ExitCode.OK
    assert yaml.safe_load(capsys.readouterr().out)["compiler"]["max_seq_len"] == 512
    assert main(["-cn", "smollm2", "--cfg", "job", "compiler.max_seq_len=x"]) is ExitCode.USAGE
    assert main(["-cn", "nosuch", "--info", "defaults"]) is ExitCode.USAGE
    assert main(["-cn", "smollm2", "--info", "defaults-tree"]) is ExitCode.OK
    assert "compiler: trtrtx" in capsys.readouterr().out
    assert not (tmp_path / "artifacts").exists(), "nothing is built"


def test_full_disk_is_transient_also_in_the_words_of_the_safetensors_library() -> None:
    from safetensors import SafetensorError

    seen = "Error while serializing: I/O error: No space left on device (os error 28)"
    outcome = failure_of(SafetensorError(seen))
    assert outcome.exit_code is ExitCode.TRANSIENT
    assert "free some space" in outcome.message
    assert failure_of(SafetensorError("HeaderTooSmall")).exit_code is ExitCode.FAILED


def test_full_disk_does_not_turn_log_lines_into_failures() -> None:
    with screen_logging(), file_logging(Path("/dev/full")):
        logging.getLogger("pipeline.build").info("one line")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    assert enginesmith(work, "build", "smollm2").returncode == 0
    return work


@pytest.mark.slow
def test_quality_is_within_one_percent_and_the_verdict_is_checked(built: Path) -> None:
    verdict = json.loads((built / "artifacts/.runs/latest/verdict.json").read_text())
    assert verdict["verdict"] == "checked"
    report = json.loads(Path(verdict["report"]).read_text())
    assert report["quality"]["tokens"] >= 8192
    assert report["quality"]["perplexity_change"]["value"] <= 0.01
    assert report["checks"]["plan"]["quantized_linears"] == 78
    assert "RTX-4090" in report["not_run"][0]
    print(json.dumps({"quality": report["quality"], "speed": report["speed"]}, indent=1))


@pytest.mark.slow
def test_package_answers_and_says_what_answers(built: Path) -> None:
    done = enginesmith(built, "generate", "smollm2:candidate", "What is the capital of France?")
    assert "Paris" in done.stdout
    assert "onnxruntime answers for it" in done.stderr
