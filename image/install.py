"""Installs the builder beside an image's own packages, without changing one of them.

Dockerfile.build runs this with the image's interpreter; it needs nothing but Python and pip. All of
ours goes into a virtual environment that sees the image's packages too. Pip gets the image's
versions as constraints: where a package of ours cannot live with them, the build stops.

    python3 install.py dependencies --lock requirements-image.lock --into /opt/enginesmith
    python3 install.py project --into /opt/enginesmith SOURCE_DIR
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

BASE_PACKAGES = "base-packages.txt"
"""In the environment's folder: what the image held, as pip constraints."""

LEFT_OUT = ("tensorrt-rtx-cu13",)
"""Of our extra `build`: RTX engines need no GPU and no image, so this image does not build them."""

_ELSEWHERE = "/"
"""Working directory of the interpreters: `-m` and `-c` see packages' records in theirs, such as
those that `pip install .` leaves in a checkout."""

_VERSION = re.compile(r"[0-9][0-9A-Za-z.!+-]*")
"""Loosely a version of PEP 440; Debian's packages of Python tools have others, which pip refuses
to read in a constraint."""


def canonical(name: str) -> str:
    """A distribution's name as PEP 503 compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(lock: str) -> dict[str, str]:
    """Name -> version of the lines of a lock file.

    Raises:
        SystemExit: A line that is no `name==version`.
    """
    pins = {}
    for line in lock.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, separator, version = line.strip().partition("==")
        if not separator:
            sys.exit(f"{line!r} is no name==version; make the lock again with pip freeze")
        pins[canonical(name)] = version
    return pins


def lacking(pins: Mapping[str, str], base: Mapping[str, str]) -> dict[str, str]:
    """The pins of packages that the image does not hold in any version."""
    return {name: version for name, version in pins.items() if name not in base}


def as_requirements(versions: Mapping[str, str]) -> str:
    """One `name==version` a line, without versions that pip could not read."""
    usable = {name: version for name, version in versions.items() if _VERSION.fullmatch(version)}
    return "".join(f"{name}=={version}\n" for name, version in sorted(usable.items()))


def installed(python: Path | str) -> dict[str, str]:
    """Name -> version of every distribution that an interpreter sees."""
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=json"],
        env=_environment(),
        cwd=_ELSEWHERE,
        check=True,
        stdout=subprocess.PIPE,
    )
    return {canonical(entry["name"]): entry["version"] for entry in json.loads(listed.stdout)}


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Packages that are gone or have another version."""
    return [
        f"{name} was {version}, is {after.get(name, 'gone')}"
        for name, version in sorted(before.items())
        if after.get(name) != version
    ]


def install_dependencies(lock: Path, into: Path) -> None:
    """Make the environment and install what the image lacks.

    Raises:
        SystemExit: Pip found no way, or a package of the image is not what it was.
    """
    into = into.absolute()
    base = installed(sys.executable)
    subprocess.run(
        [sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", str(into)],
        check=True,
    )
    constraints, wanted = into / BASE_PACKAGES, into / "added-packages.txt"
    constraints.write_text(as_requirements(base))
    wanted.write_text(as_requirements(lacking(pinned(lock.read_text()), base)))
    print(f"The image has {len(base)} packages; missing, and installed beside them:")
    print(wanted.read_text(), flush=True)
    _pip(into, "install", "--constraint", str(constraints), "--requirement", str(wanted))
    for python in (Path(sys.executable), into / "bin" / "python"):
        if faults := changed(base, installed(python)):
            sys.exit(f"{python}: packages of the image changed:\n" + "\n".join(faults))


def install_project(source: Path, into: Path) -> None:
    """Install the project without its dependencies, then compare these with what there is.

    Raises:
        SystemExit: A dependency is missing or outside its range.
    """
    into = into.absolute()
    _pip(into, "install", "--no-deps", str(source.absolute()))
    checked = subprocess.run(
        [str(into / "bin" / "python"), "-c", _UNMET, "enginesmith", *LEFT_OUT],
        cwd=_ELSEWHERE,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    if checked.stdout:
        sys.exit("the image's packages do not suffice for this project:\n" + checked.stdout)


_UNMET = """
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from packaging.requirements import Requirement

for line in requires(sys.argv[1]) or ():
    wanted = Requirement(line)
    needed = wanted.marker is None or wanted.marker.evaluate({"extra": "build"})
    if not needed or wanted.name in sys.argv[2:]:
        continue
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        found = "missing"
    if found == "missing" or not wanted.specifier.contains(found, prereleases=True):
        print(f"{wanted.name} is {found}, wanted {wanted.specifier or 'any'}")
"""
"""Run by the new environment, which has `packaging`; prints what is not met."""


def _pip(into: Path, *arguments: str) -> None:
    """Run the image's pip on the new environment."""
    command = [str(into / "bin" / "python"), "-m", "pip", *arguments, "--no-cache-dir"]
    done = subprocess.run(command, env=_environment(), cwd=_ELSEWHERE, check=False)
    if done.returncode:
        sys.exit(f"pip ended with exit code {done.returncode}; its reason is above")


def _environment() -> dict[str, str]:
    """Ours, less the image's own constraint file: it would also bind the tools that build wheels.

    What it protects is in our constraints already, by exact version.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    return {**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def main() -> None:
    """Parse the command line and run one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    steps = parser.add_subparsers(dest="step", required=True)
    dependencies = steps.add_parser("dependencies")
    dependencies.add_argument("--lock", type=Path, required=True)
    project = steps.add_parser("project")
    project.add_argument("source", type=Path)
    for step in (dependencies, project):
        step.add_argument("--into", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.step == "dependencies":
        install_dependencies(arguments.lock, arguments.into)
    else:
        install_project(arguments.source, arguments.into)


if __name__ == "__main__":
    main()
