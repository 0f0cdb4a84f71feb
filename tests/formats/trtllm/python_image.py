"""An image with Python and the fake `trtllm-build`, made from this machine's own files.

No registry can be reached from a test. The interpreter that runs the tests is copied with its
standard library and the shared libraries that it is linked with; busybox gives it a shell.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tests.formats.trtllm.fakes import fake_build_program, package_records

if TYPE_CHECKING:
    from docker import DockerClient

IMAGE = "enginesmith-build:1.2.1"

_DOCKERFILE = """\
FROM scratch
COPY root /
RUN ["/bin/busybox", "sh", "-c", "/bin/busybox mkdir -p /tmp /sbin && /bin/busybox --install /bin"]
ENV PYTHONHOME={home} PYTHONDONTWRITEBYTECODE=1 LD_LIBRARY_PATH={libraries}
"""
_NOT_NEEDED = frozenset(
    {"test", "site-packages", "idlelib", "tkinter", "ensurepip", "lib2to3", "__pycache__"}
)


def build_python_image(client: DockerClient, folder: Path, packages: Path) -> None:
    """Build the image in this engine, with the Python packages of a folder installed.

    `folder` is for files that are made on the way.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    programs = _programs(folder)
    interpreter = Path(sys.base_prefix) / "bin" / f"python{sysconfig.get_python_version()}"
    extensions = sorted((stdlib / "lib-dynload").glob("*.so"))
    libraries = sorted(set(_libraries([interpreter, *extensions])))
    folders = sorted({str(path.parent) for path in libraries})
    dockerfile = _DOCKERFILE.format(home=sys.base_prefix, libraries=":".join(folders))
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        _add_bytes(tar, "Dockerfile", dockerfile.encode())
        _add(tar, Path(shutil.which("busybox") or ""), "root/bin/busybox")
        for name, source in programs.items():
            _add(tar, source, f"root/usr/bin/{name}")
        _add(tar, interpreter, "root/usr/bin/python3")
        for library in libraries:
            _add(tar, library, f"root{library}")
        for path in _tree(stdlib):
            _add(tar, path, f"root{path}")
        site = f"{sys.base_prefix}/lib/python{sysconfig.get_python_version()}/site-packages"
        for record in (folder / "packages").glob("*/METADATA"):
            _add(tar, record, f"root{site}/{record.parent.name}/METADATA")
        for path in _tree(packages):
            _add(tar, path, f"root{site}/{path.relative_to(packages)}")
    context.seek(0)
    client.images.build(fileobj=context, custom_context=True, tag=IMAGE, rm=True)


def misbehaving_image(client: DockerClient, behaviour: str) -> str:
    """The same image, whose program does what `fake_trtllm_build.py` lists."""
    tag = f"enginesmith-build:{re.sub('[^a-z]+', '-', behaviour.lower()).strip('-')[:40]}"
    dockerfile = io.BytesIO(f'FROM {IMAGE}\nENV FAKE_TRTLLM="{behaviour}"\n'.encode())
    client.images.build(fileobj=dockerfile, tag=tag, rm=True)
    return tag


def _programs(folder: Path) -> dict[str, Path]:
    """Program and options for /usr/bin."""
    package_records(folder / "packages")
    fake_build_program(folder, "/usr/bin/python3")
    return {name: folder / name for name in ("trtllm-build", "trtllm_build_options.json")}


def _libraries(binaries: list[Path]) -> Iterator[Path]:
    """Shared libraries that the binaries are linked with, the loader included."""
    listed = subprocess.run(
        ["ldd", *map(str, binaries)], capture_output=True, text=True, check=False
    ).stdout
    for match in re.finditer(r"(?:=> )?(/\S+) \(0x", listed):
        yield Path(match.group(1))


def _tree(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name in _NOT_NEEDED or path.name.startswith("config-"):
            continue
        if path.is_dir():
            yield from _tree(path)
        elif path.is_file():
            yield path


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    resolved = path.resolve()
    entry = tar.gettarinfo(str(resolved), name)
    entry.uid = entry.gid = 0
    with resolved.open("rb") as stream:
        tar.addfile(entry, stream)


def _add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
