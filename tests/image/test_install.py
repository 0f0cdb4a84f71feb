"""The build image's installer, with real pip, on a base of empty packages; what goes into it."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import packaging
import pytest

from image.install import installed, pinned
from tests.image.base import write_wheel

INSTALLER = Path("image/install.py").resolve()


def test_records_in_the_working_directory_are_not_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `pip install .` leaves them in a checkout."""
    record = tmp_path / "stray.egg-info" / "PKG-INFO"
    record.parent.mkdir()
    record.write_text("Metadata-Version: 2.1\nName: stray\nVersion: 1\n")
    monkeypatch.chdir(tmp_path)
    assert "stray" not in installed(sys.executable)


@dataclass(frozen=True)
class Base:
    """An image's interpreter with packages of its own."""

    python: Path
    packages: Path

    @functools.cached_property
    def before(self) -> dict[str, str]:
        """What it holds; asked for before anything is installed beside it."""
        return self.packages_seen()

    def packages_seen(self, python: Path | None = None) -> dict[str, str]:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("PYTHONPATH", str(self.packages))
            return installed(python or self.python)

    def run(self, wheels: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The installer as Dockerfile.build calls it, without network."""
        return subprocess.run(
            [str(self.python), str(INSTALLER), *arguments],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(self.packages),
                "PIP_NO_INDEX": "1",
                "PIP_FIND_LINKS": str(wheels),
                "PIP_CONFIG_FILE": os.devnull,
                # An image's own constraint file, which would forbid everything.
                "PIP_CONSTRAINT": str(wheels / "constraint.txt"),
            },
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """This machine's interpreter with pip and the packages `pinned-one` and `old-tool`.

    No virtual environment: one made from it would see the packages of the interpreter below it.
    """
    root = tmp_path_factory.mktemp("base")
    wheels = [
        write_wheel(root / "wheels", "pinned-one", "1.0"),
        write_wheel(root / "wheels", "old-tool", "3.0+local.1"),
    ]
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root / "packages")
    # By its metadata: setuptools watches the import system for pip, and would then give the rest
    # of this process another distutils.
    pip = Path(str(distribution("pip").locate_file("pip")))
    shutil.copytree(pip, root / "packages" / "pip")
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    made = Base(python=python, packages=root / "packages")
    assert made.before
    return made


def dependencies(
    base: Base, folder: Path, lock: str, **requires: list[str]
) -> subprocess.CompletedProcess[str]:
    """Install `lock` beside `base`; the wheels that can be had are those of the lock and one."""
    wheels = folder / "wheels"
    for name, version in pinned(lock).items():
        write_wheel(wheels, name, version, requires.get(name.replace("-", "_"), []))
    write_wheel(wheels, "pinned-one", "2.0")
    (wheels / "constraint.txt").write_text("setuptools==1\nours==0\n")
    (folder / "lock.txt").write_text(lock)
    step = ("dependencies", "--lock", str(folder / "lock.txt"), "--into", str(folder / "into"))
    return base.run(wheels, *step)


def test_the_images_versions_win_and_the_rest_is_added(base: Base, tmp_path: Path) -> None:
    lock = "pinned-one==2.0\nours==1.5\nours-helper==0.1\n"
    done = dependencies(base, tmp_path, lock, ours=["pinned-one>=1", "ours-helper"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ours==1.5\nours-helper==0.1\n" in done.stdout
    assert base.packages_seen() == base.before
    seen = base.packages_seen(tmp_path / "into/bin/python")
    assert seen["pinned-one"] == "1.0"
    assert seen["old-tool"] == "3.0+local.1"
    assert (seen["ours"], seen["ours-helper"]) == ("1.5", "0.1")
    constraints = (tmp_path / "into/base-packages.txt").read_text()
    assert "pinned-one==1.0\n" in constraints


def test_package_that_cannot_live_with_the_images_stops_the_build(
    base: Base, tmp_path: Path
) -> None:
    done = dependencies(base, tmp_path, "ours==1.5\n", ours=["pinned-one>=2"])
    assert done.returncode == 1
    assert "pinned-one" in done.stdout + done.stderr
    assert "pip ended with exit code" in done.stderr
    assert base.packages_seen() == base.before
    assert "ours" not in base.packages_seen(tmp_path / "into/bin/python")


@pytest.mark.parametrize(
    ("requires", "faults"),
    [
        (("pinned-one>=1", "tensorrt-rtx-cu13==1; extra == 'build'"), ()),
        (
            ("pinned-one>=1.1; extra == 'build'", "not-there"),
            ("pinned-one is 1.0, wanted >=1.1", "not-there is missing, wanted any"),
        ),
    ],
)
def test_project_is_installed_alone_and_its_requirements_are_checked(
    base: Base, tmp_path: Path, requires: tuple[str, ...], faults: tuple[str, ...]
) -> None:
    into = tmp_path / "into"
    command = [str(base.python), "-m", "venv", "--system-site-packages", "--without-pip", str(into)]
    subprocess.run(command, check=True)
    (target,) = into.glob("lib/python*/site-packages")  # the lock holds what the check imports
    shutil.copytree(Path(packaging.__file__).parent, target / "packaging")
    wheel = write_wheel(tmp_path / "source", "enginesmith", "9.9", requires)
    done = base.run(tmp_path, "project", "--into", str(into), str(wheel))
    assert base.packages_seen(into / "bin/python")["enginesmith"] == "9.9"
    assert done.returncode == bool(faults), done.stdout + done.stderr
    assert all(fault in done.stderr for fault in faults)


@pytest.fixture
def sent(tmp_path: Path) -> set[str]:
    """Paths that the ignore file lets through, of a checkout with much else in it."""
    from docker.utils.build import exclude_paths

    for name in (
        "LICENSE", "Makefile", "README.md", "pyproject.toml", "requirements-image.lock",
        "image/install.py", "conf/build.yaml", "pipeline/cli.py",
        "recipes/smollm2.yaml",
        "pipeline/__pycache__/cli.pyc", "wheels/a-1-py3-none-any.whl", ".git/config", ".env",
        ".venv/bin/python", "artifacts/phi3/engine/rank0.engine", "model.safetensors",
        "tests/tiny.py", "token.txt",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    lines = Path(".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    sent = exclude_paths(str(tmp_path), patterns)
    return {name for name in sent if (tmp_path / name).is_file()}


def test_engine_gets_what_the_dockerfile_copies_and_nothing_else(sent: set[str]) -> None:
    assert sent == {
        "LICENSE", "Makefile", "README.md", "pyproject.toml", "requirements-image.lock",
        "image/install.py", "conf/build.yaml", "pipeline/cli.py",
        "recipes/smollm2.yaml",
        "wheels/a-1-py3-none-any.whl",
    }  # fmt: skip


def test_lock_has_the_images_pins_and_names_no_place() -> None:
    lock = Path("requirements-image.lock").read_text()
    pins = pinned(lock)
    assert pins["nvidia-modelopt"] == "0.37.0"
    assert pins["transformers"] == "4.57.3"
    assert pins["numpy"].startswith("1.26.")
    assert pins["onnx"].startswith("1.19.")
    assert "://" not in lock
    assert "+" not in "".join(pins.values()), "a local version can be had in one place only"


def make(*arguments: str) -> str:
    """The commands that make would run."""
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("target", ["engine", "plan", "test-image-pins", "test-gpu"])
def test_given_interpreter_is_used_and_nothing_is_installed(target: str) -> None:
    commands = make(target, "MODEL=phi3", "PYTHON=python3")
    assert "python3 -m p" in commands
    assert "venv" not in commands
    assert "pip" not in commands.replace("pipeline", "")
