"""An installed wheel works outside the checkout: recipes and options travel in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.tiny_recipe import ROOT, enginesmith


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel."""
    pytest.importorskip("setuptools")
    work = tmp_path_factory.mktemp("wheel")
    checkout = work / "checkout"
    checkout.mkdir()
    for name in ("pipeline", "conf", "recipes"):  # a copy: setuptools writes beside the sources
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, checkout / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "-w", str(work), str(checkout)], check=True)
    (wheel,) = work.glob("enginesmith-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "site")
    shutil.rmtree(checkout)
    for name in ("conf", "recipes"):  # another package's, beside ours
        (work / "site" / name).mkdir()
        (work / "site" / name / "foreign.yaml").touch()
    return work / "site"


def test_wheel_holds_every_recipe_option_and_module(site: Path) -> None:
    for name, kept in (("conf", "pipeline/_data/conf"), ("recipes", "pipeline/_data/recipes")):
        wanted = {path.relative_to(ROOT / name) for path in (ROOT / name).rglob("*.yaml")}
        found = {path.relative_to(site / kept) for path in (site / kept).rglob("*.yaml")}
        assert wanted == found
    modules = {path.relative_to(ROOT) for path in (ROOT / "pipeline").rglob("*.py")}
    assert modules <= {path.relative_to(site) for path in site.rglob("*.py")}


def test_wheel_plans_a_recipe_outside_the_checkout(site: Path, tmp_path: Path) -> None:
    done = enginesmith(tmp_path, "plan", "smollm2", "--json", PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_wheel_brings_its_own_recipes_alone(site: Path, tmp_path: Path) -> None:
    done = enginesmith(tmp_path, "build", "nosuch", PYTHONPATH=str(site))
    assert done.returncode == 2
    assert "smollm2" in done.stderr
    assert "foreign" not in done.stderr
    verdict = tmp_path / "artifacts" / ".runs" / "latest" / "verdict.json"
    assert json.loads(verdict.read_text())["exit_code"] == 2
