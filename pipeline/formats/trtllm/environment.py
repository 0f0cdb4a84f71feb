"""What an engine is built with: versions, card, driver and image, asked for before the build."""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.core.errors import IncompatibleError
from pipeline.core.hardware import Target
from pipeline.core.values import digest_of
from pipeline.core.workfolder import PREFIX, work_folder
from pipeline.formats.trtllm.build_tool import TIMING_CACHE_FILE
from pipeline.formats.trtllm.place import Place, Shared
from pipeline.formats.trtllm.spec import NAME, VERSION

_TIMEOUT_S = 300.0


def _write_versions(path: str) -> None:
    """Write the versions of what builds the engine as JSON.

    Its source is run by the interpreter that has TensorRT-LLM, where this project need not be
    installed: it imports the standard library only, and nothing that touches a GPU. TensorRT's
    version is not in the engine's `config.json`, although an engine loads only in that version.
    """
    import contextlib
    import importlib.metadata
    import importlib.util
    import json
    import runpy
    from pathlib import Path

    found = {"cuda": ""}
    for name in ("tensorrt_llm", "tensorrt"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    if not found["tensorrt"]:  # the image's own build of it may have left no record for pip
        with contextlib.suppress(ImportError):
            found["tensorrt"] = str(importlib.import_module("tensorrt").__version__)
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        version_file = Path(torch.origin).parent / "version.py"
        if version_file.is_file():
            found["cuda"] = str(runpy.run_path(str(version_file)).get("cuda") or "")
    Path(path).write_text(json.dumps(found))


PROBE = f"{inspect.getsource(_write_versions)}\nimport sys\n_write_versions(sys.argv[1])\n"
"""Program for `python3 -P -c`; its argument is the file to write."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What shapes an engine beside its inputs.

    Attributes:
        tensorrt_llm: Version.
        tensorrt: Version; an engine loads in no other.
        cuda: CUDA release of the installed PyTorch; empty if unknown.
        card: The card that kernels are timed on, such as `NVIDIA-GeForce-RTX-4090`.
        sm: Its compute capability x 10.
        driver: Version of the NVIDIA driver.
        image: Digest of the image; empty on this machine.
    """

    tensorrt_llm: str
    tensorrt: str
    cuda: str
    card: str
    sm: int
    driver: str
    image: str

    @property
    def shaping(self) -> dict[str, str | int]:
        """The part that shapes the engine's bytes: all but the driver."""
        return {name: value for name, value in asdict(self).items() if name != "driver"}

    @property
    def tools(self) -> Mapping[str, str]:
        """Name -> version, for the manifest; unknown ones are left out."""
        named = {
            NAME: self.tensorrt_llm,
            "tensorrt": self.tensorrt,
            "cuda": self.cuda,
            "build-image": self.image,
        }
        return {name: value for name, value in named.items() if value}


def probe_environment(place: Place, target: Target, log_path: Path) -> Environment:
    """Ask the place, which has the target's card, for its versions.

    Raises:
        IncompatibleError: It has no TensorRT-LLM, or another release.
        ToolError: The probe did not run.
    """
    with tempfile.TemporaryDirectory(prefix="enginesmith-probe-") as folder:
        answers = Shared(name="answers", source=Path(folder), read_only=False)
        place.run(
            [place.python, "-P", "-c", PROBE, f"{place.path(answers)}/versions.json"],
            [answers],
            stage="probe",
            log_path=log_path,
            timeout_s=_TIMEOUT_S,
        )
        versions = json.loads((Path(folder) / "versions.json").read_text())
    environment = Environment(
        **versions,
        card=target.card,
        sm=target.sm,
        driver=place.gpu.driver if place.gpu else "",
        image=place.image_digest,
    )
    if environment.tensorrt_llm != VERSION or not environment.tensorrt:
        where = f"the image {environment.image}" if environment.image else "this machine"
        raise IncompatibleError(
            f"compiler=trtllm needs TensorRT-LLM {VERSION} with its TensorRT; {where} has "
            f"TensorRT-LLM {environment.tensorrt_llm or 'none'} and TensorRT "
            f"{environment.tensorrt or 'none'}; use the build image (make image)"
        )
    return environment


@dataclass(frozen=True)
class TimingCache:
    """Measured kernels of one environment, below the stage cache's `root`: the next build's start.

    TensorRT takes a cache only from the same version and card; so do we, by the folder's name. The
    file is replaced by one rename: a build that runs beside it reads an old one or a new one.
    """

    root: Path
    environment: Environment

    @property
    def file(self) -> Path:
        """Where it is kept."""
        return self.root / "timing" / digest_of(self.environment.shaping)[:24] / TIMING_CACHE_FILE

    def lend(self, folder: Path) -> Path | None:
        """Copy it into `folder`; None when there is none yet."""
        try:
            return Path(shutil.copyfile(self.file, folder / "lent.cache"))
        except FileNotFoundError:
            return None

    def keep(self, folder: Path) -> None:
        """Store what a build wrote into `folder`; nothing, if it wrote none or an empty one."""
        written = folder / TIMING_CACHE_FILE
        if not written.is_file() or written.stat().st_size == 0:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with work_folder(self.file.parent, PREFIX) as work:
            shutil.copyfile(written, work.dir / written.name).replace(self.file)
