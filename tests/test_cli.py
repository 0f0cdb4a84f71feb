from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline import cli
from pipeline.__main__ import Request
from pipeline.answer import Answer, make_table, tell
from pipeline.core.errors import ExitCode
from pipeline.registry.reference import reference_of
from pipeline.registry.stores.folder import FolderRegistry
from tests.registry.packages import sealed_package
from tests.tiny_recipe import enginesmith, run_python


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("GITHUB_OUTPUT", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.make_app(), arguments)


@pytest.fixture
def published(workdir: Path) -> str:
    """An unsigned package in ./artifacts."""
    package = sealed_package(workdir / "sealed", {"model.plan": b"plan"})
    FolderRegistry(path=workdir / "artifacts").store().put_package(package, [], lambda count: None)
    return str(reference_of(package))


def test_help_imports_nothing_heavy(workdir: Path) -> None:
    code = (
        "import sys; from pipeline import cli; sys.argv[1:] = ['--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'hydra', 'omegaconf', 'torch', 'pydantic'} & set(sys.modules)))\n"
    )
    done = run_python(workdir, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_build_is_the_same_request_as_hydras_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []

    def answer(request: Request) -> Answer:
        seen.append(request)
        return Answer(exit_code=ExitCode.NOT_ACCEPTED)

    monkeypatch.setattr("pipeline.__main__.answer", answer)
    done = invoke("build", "smollm2", "a.b=1", "~c", "--config-dir", "x")
    assert done.exit_code == 3
    assert seen == [Request(recipe="smollm2", overrides=("a.b=1", "~c"), config_dir=Path("x"))]


def test_bad_recipe_is_the_same_through_both_entry_points(workdir: Path) -> None:
    hydra_like = run_python(workdir, "-m", "pipeline", "--config-name", "nosuch", "bad")
    command = enginesmith(workdir, "build", "nosuch", "bad")
    assert hydra_like.returncode == command.returncode == 2
    assert hydra_like.stderr == command.stderr
    assert "there is no recipe 'nosuch'" in command.stderr
    runs = [path for path in (workdir / "artifacts" / ".runs").iterdir() if not path.is_symlink()]
    assert [json.loads((run / "verdict.json").read_text())["exit_code"] for run in runs] == [2, 2]


@pytest.mark.parametrize("command", ["plan", "build"])
def test_without_the_builders_packages_a_command_names_what_installs_them(
    command: str, workdir: Path
) -> None:
    code = (
        "import sys; sys.modules['hydra'] = None\n"
        "from pipeline import cli\n"
        f"sys.argv[1:] = [{command!r}, 'smollm2']; sys.exit(cli.main())\n"
    )
    done = run_python(workdir, "-c", code)
    assert done.returncode == 6
    assert "pip install '.[build]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_list_of_nothing_says_how_to_make_something() -> None:
    assert "enginesmith build RECIPE" in invoke("list").output
    assert json.loads(invoke("list", "--json").output)["packages"] == []


def test_list_and_show_name_the_package(published: str) -> None:
    assert published in invoke("list").output
    (entry,) = json.loads(invoke("list", "--json").output)["packages"]
    assert entry["reference"] == published
    assert entry["state"] == "unsigned"
    assert entry["digest"] in invoke("show", f"tiny@sha256:{entry['digest']}").output
    shown = json.loads(invoke("show", published, "--json").output)
    assert shown["manifest"]["name"] == "tiny"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_reference_can_be_copied_from_a_narrow_terminal_and_grepped_in_a_pipe(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    if terminal:
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    reference, card = "phi3/any-checkpoint-fp8:1.0.0-" + 50 * "a", 30 * "c"
    tell(Answer(shown=[make_table(("reference", "card"), [(reference, card)])]))
    printed = capsys.readouterr().out.splitlines()
    assert printed == (
        [reference, f"  {card}"]
        if terminal
        else [f"{'reference':{len(reference)}}  card", f"{reference}  {card}"]
    )
