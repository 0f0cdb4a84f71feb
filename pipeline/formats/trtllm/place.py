"""Where TensorRT-LLM's programs run: on this machine, or in a container of the build image.

    place = choose_place("auto", image=image, card=lambda: find_card(target))
    place.run([..., place.path(engine)], [checkpoint, engine], stage="compile", log_path=log, ...)

Only the paths in a command differ. Nothing reaches the network: a container has none, and here the
Hub's clients are told to stay offline. A container writes as the caller, sees only what is mounted,
and is removed whatever happens; what a killed process leaves behind, the next run removes: a label
names each container's owner. Only a local Docker engine will do: one behind tcp:// or ssh:// would
look for the folders on its own disk.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.core.errors import AccessError, IncompatibleError, PipelineError, ToolError
from pipeline.core.gpu import Gpu, find_gpu, probe_gpus
from pipeline.core.hardware import Target, card_name
from pipeline.core.process import Started, last_lines, run_tool
from pipeline.formats.trtllm.spec import BUILD_PROGRAM, CUDA, OLDEST_DRIVER, VERSION

log = logging.getLogger(__name__)

Where = Literal["auto", "local", "docker"]

OWNER_LABEL = "enginesmith.owner"
SHM_BYTES = 1 << 30
"""As NVIDIA's framework containers ask for; Docker's 64 MB are too small for PyTorch."""
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
_HOME = "/home/enginesmith"
_ANSWER_TIMEOUT_S = 300.0
_DOCKER_FAILED = 125
"""Exit code of `docker run` where Docker failed and not the program in the container."""

_OUT_OF_MEMORY = (
    "a process in the container was killed at its memory limit, so the output is not whole; allow "
    "it more memory, or give it less to do"
)
_NO_GPU_RUNTIME = (
    "Docker cannot give a container the GPU here: install the NVIDIA Container Toolkit "
    "(https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/), then run "
    "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
)
_GPU_HOOKS = ("nvidia-container-runtime-hook", "nvidia-cdi-hook")
"""`docker run --gpus` needs one of them on the engine's PATH, not the `nvidia` runtime (Moby, pull
request 50228): an engine that does not list the runtime may still do."""

_CAUSES: Mapping[str, tuple[type[PipelineError], str]] = {
    r"permission denied while trying to connect": (
        AccessError,
        "no permission to use Docker's socket: add yourself to the docker group "
        "(sudo usermod -aG docker $USER), then log in again",
    ),
    r"Cannot connect to the Docker daemon|failed to connect to the docker API": (
        IncompatibleError,
        "no Docker engine here: install one (https://docs.docker.com/engine/install/), start it "
        "(sudo systemctl start docker), or set DOCKER_HOST to its socket; in a pod, run the pod "
        "itself from the build image, where trtllm-build is on the PATH",
    ),
    r"[Nn]o such image": (
        IncompatibleError,
        "the image is not on this machine; get it: make image, or docker pull where its name "
        "begins with a registry",
    ),
    r"could not select device driver": (IncompatibleError, _NO_GPU_RUNTIME),
    r"nvidia-container": (
        IncompatibleError,
        "NVIDIA's container runtime refused the image; see whether nvidia-smi works here, and "
        "whether the driver is new enough for the image",
    ),
    r"bind source path does not exist": (
        IncompatibleError,
        "if the folder exists here, the Docker engine sees another file system (that of a host "
        "around this container, or of a virtual machine): use a folder that both see",
    ),
}
"""What Docker prints (28.2) -> what it means and what to do."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A file or folder of this machine that a program sees; in a container as `/mnt/<name>`."""

    name: str
    source: Path
    read_only: bool = True


@dataclass(frozen=True, kw_only=True)
class ToolHost:
    """Runs TensorRT-LLM's programs.

    Attributes:
        gpu: The one card that they see.
        program: Path of `trtllm-build` here, usually the inside of the build image; None for a
            container of `image`, which must be on this machine.
        image_digest: Its identity.
        memory_bytes: Limit of a container's memory, swap included.
    """

    gpu: Gpu | None
    program: Path | None = None
    image: str = ""
    image_digest: str = ""
    memory_bytes: int | None = None

    @property
    def python(self) -> str:
        """The interpreter that has TensorRT-LLM: that of the program's first line, else our own."""
        if self.program is None:
            return "python3"
        with self.program.open("rb") as stream:
            first = stream.readline(4096).decode("utf-8", errors="replace")
        words = first.removeprefix("#!").split() if first.startswith("#!") else []
        known = words and "python" in Path(words[0]).name and Path(words[0]).is_file()
        return words[0] if known else sys.executable

    def path(self, shared: Shared) -> str:
        return f"/mnt/{shared.name}" if self.program is None else str(shared.source)

    @contextlib.contextmanager
    def started(
        self, command: Sequence[str], shared: Sequence[Shared], *, stage: str
    ) -> Iterator[Started]:
        """What starts a program, whose paths are from `path`, and removes what was made for it."""
        env = dict(_OFFLINE)
        if self.gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = self.gpu.uuid
        if self.program is not None:
            # A caller with a foreign uid in an image has a HOME that it cannot write.
            with tempfile.TemporaryDirectory(prefix="enginesmith-home-") as home:
                yield Started(command=tuple(command), env={**env, "HOME": home})
            return
        _remove_stale()
        name = f"enginesmith-{stage}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        options = ["--name", name, *self._options(env, shared)]
        try:
            yield Started(command=("docker", "run", *options, self.image, *command))
        finally:
            _remove(name)

    def run(
        self,
        command: Sequence[str],
        shared: Sequence[Shared],
        *,
        stage: str,
        log_path: Path,
        timeout_s: float,
        explain: Callable[[Path, int], str] = lambda log_path, returncode: "",
    ) -> None:
        """Run a program to its end; arguments as of `run_tool` and `started`.

        `explain` says what to change, by log and exit code; nothing for an unknown cause.

        Raises:
            ToolError: It failed, a process of it hit the memory limit, or time ran out.
            PipelineError: The engine could not start it; kind and advice as in `_CAUSES`.
        """
        with self.started(command, shared, stage=stage) as started:
            began, failure, hint = time.monotonic(), None, ""
            try:
                run_tool(
                    started.command,
                    stage=stage,
                    log_path=log_path,
                    env=started.env,
                    timeout_s=timeout_s,
                )
            except ToolError as error:
                failure = error
            timed_out = time.monotonic() - began >= timeout_s  # its own message says so
            returncode = failure.returncode if failure else 0
            if self.program is None and returncode == _DOCKER_FAILED:
                raise _fault("\n".join(last_lines(log_path, 3)), self.image) from failure
            if self.program is None and _hit_memory_limit(started.command):
                hint = _OUT_OF_MEMORY
            if (failure or hint) and not timed_out:
                hint = explain(log_path, returncode) or hint
            if hint:
                raise ToolError(
                    stage=stage,
                    command=started.command,
                    returncode=returncode,
                    log_path=log_path,
                    last_lines=last_lines(log_path),
                    hint=hint,
                ) from failure
            if failure is not None:
                raise failure

    def _options(self, env: Mapping[str, str], shared: Sequence[Shared]) -> list[str]:
        options = [
            *("--pull", "never", "--network", "none", "--interactive"),
            "--init",  # reaps, and passes SIGTERM on
            # The output is read as it comes; Docker's own log would be a second copy.
            *("--log-driver", "none"),
            *("--label", f"{OWNER_LABEL}={owner_of(os.getpid())}"),
            *("--user", f"{os.getuid()}:{os.getgid()}"),  # what it writes belongs to the caller
            # exec: Triton loads what it compiled below HOME
            *("--tmpfs", f"{_HOME}:exec,mode=1777", "--shm-size", str(SHM_BYTES)),
        ]
        if self.gpu is not None:
            options += ["--gpus", "all"]
        if self.memory_bytes:
            limit = str(self.memory_bytes)
            options += ["--memory", limit, "--memory-swap", limit]
        # The image's /etc/passwd does not know the uid; getpass, and so torch, then asks USER.
        for key, value in {"HOME": _HOME, "USER": "enginesmith", **env}.items():
            options += ["--env", f"{key}={value}"]
        for item in shared:
            source = str(item.source.resolve()).replace('"', '""')
            # `--volume` would make an empty folder where a source is missing; quoted as CSV.
            mount = f'type=bind,"source={source}",target=/mnt/{item.name}'
            options += ["--mount", f"{mount},readonly" if item.read_only else mount]
        return options


def choose_place(
    where: Where,
    *,
    image: str,
    card: Callable[[], Gpu],
    memory_bytes: int | None = None,
    section: str = "compiler",
) -> ToolHost:
    """Choose where to run, and make every check that needs no download and starts nothing.

    `auto` is here when `trtllm-build` is on the PATH, else Docker; `card` finds the card or raises.

    Raises:
        IncompatibleError: No program, card, driver, engine or image for it.
        AccessError: The user may not use Docker.
    """
    program = shutil.which(BUILD_PROGRAM)
    if where != "docker" and program:
        return ToolHost(gpu=card(), program=Path(program))
    if where == "local":
        raise IncompatibleError(
            f"{BUILD_PROGRAM} is not on the PATH: run inside the build image, or install "
            f"tensorrt-llm {VERSION} in this environment, or set {section}.where=docker"
        )
    try:
        gpu = card()
        digest = preflight(image, gpu)
    except IncompatibleError as error:
        if where == "docker":
            raise
        raise IncompatibleError(f"{BUILD_PROGRAM} is not on the PATH, and {error}") from error
    return ToolHost(gpu=gpu, image=image, image_digest=digest, memory_bytes=memory_bytes)


def find_card(target: Target) -> Gpu:
    """The target's own card in this machine, else IncompatibleError: the same SM will not do."""
    for gpu in probe_gpus():
        if gpu.sm == target.sm and card_name(gpu.name) == target.card:
            return gpu
    found = find_gpu(target.sm)
    raise IncompatibleError(
        f"the target {target.id} is {target.card}, this machine has {card_name(found.name)}: the "
        f"same sm_{target.sm}, but TensorRT chooses kernels by timing them, so an engine is built "
        "on the card that it is for; build there, or choose the target that is here (target=NAME)"
    )


def preflight(image: str, gpu: Gpu) -> str:
    """Make every check of Docker that starts nothing, those first that an image would not cure.

    Returns the image's `repository@sha256:…`, or its id if it was built here.
    """
    host = _docker("context", "inspect", "--format", "{{.Endpoints.docker.Host}}")
    if not host.startswith("unix://"):
        raise IncompatibleError(
            f"Docker's host is {host}: a remote engine does not see this machine's folders; run "
            "on the engine's own machine, with DOCKER_HOST unset or a unix:// socket"
        )
    require_gpu_runtime(json.loads(_docker("info", "--format", "{{json .}}")))
    require_driver(gpu)
    found = json.loads(_docker("image", "inspect", "--format", "{{json .}}", image))
    return str(next(iter(found["RepoDigests"] or ()), found["Id"]))


def require_gpu_runtime(info: Mapping[str, object]) -> None:
    """Demand an NVIDIA runtime or CDI device of what `docker info` says, or else a hook here."""
    known = json.dumps([info.get("Runtimes"), info.get("DiscoveredDevices")])
    found = re.search(r'"nvidia"|"nvidia\.com/gpu', known)
    if not found and not any(map(shutil.which, _GPU_HOOKS)):
        raise IncompatibleError(_NO_GPU_RUNTIME)


def require_driver(gpu: Gpu) -> None:
    """Demand an NVIDIA driver (such as `580.65.06`) that runs the image's CUDA."""
    major = gpu.driver.partition(".")[0]
    if not major.isdigit() or int(major) < OLDEST_DRIVER:
        raise IncompatibleError(
            f"{gpu.name}: driver {gpu.driver} is too old for CUDA {CUDA}, which needs "
            f"{OLDEST_DRIVER} or newer; install a newer driver"
        )


def _docker(*arguments: str) -> str:
    """What a short `docker` command prints; a failure has the kind and the advice of `_CAUSES`."""
    try:
        done = subprocess.run(
            ["docker", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ANSWER_TIMEOUT_S,
        )
    except FileNotFoundError as error:
        raise IncompatibleError(
            "no Docker here: the docker program is not on the PATH; install Docker "
            "(https://docs.docker.com/engine/install/)"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise _fault(f"no answer in {_ANSWER_TIMEOUT_S:.0f} s", arguments[-1]) from error
    if done.returncode:
        raise _fault(done.stderr, arguments[-1])
    return done.stdout.strip()


def _fault(text: str, name: str) -> PipelineError:
    """Docker's message about `name`, with the next step where the cause is known."""
    text = " ".join(text.split())
    for pattern, (kind, advice) in _CAUSES.items():
        if re.search(pattern, text):
            return kind(f"{advice} (Docker, {name}: {text})")
    return PipelineError(
        f"Docker failed, {name}: {text}; see whether `docker info` answers, and the log of dockerd"
    )


def _hit_memory_limit(command: Sequence[str]) -> bool:
    """A killed child of the program may leave the program's own exit code at 0."""
    name = command[command.index("--name") + 1]
    return _docker("inspect", "--format", "{{.State.OOMKilled}}", name) == "true"


def _remove(name: str) -> None:
    """Remove a container, running or not; should that fail, it hides no other error."""
    try:
        _docker("rm", "--force", "--volumes", name)
    except PipelineError as error:
        log.warning("A container is left; remove it: docker rm -f %s (%s)", name, error)


def _remove_stale() -> None:
    """Remove the containers that killed processes of this machine left behind."""
    shown = f'{{{{.Names}}}}\t{{{{.Label "{OWNER_LABEL}"}}}}'
    listed = _docker("ps", "--all", "--filter", f"label={OWNER_LABEL}", "--format", shown)
    for line in listed.splitlines():
        name, _, owner = line.partition("\t")
        if is_stale(owner):
            log.warning("Removing %s, left behind by a run that was killed", name)
            _remove(name)


def owner_of(pid: int) -> str:
    """Names a process beyond its end: PID namespace, id, start in ticks since boot (ids recur)."""
    # After the command's closing parenthesis comes the third field; the start is the 22nd.
    start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{Path('/proc/self/ns/pid').readlink()} {pid} {start}"


def is_stale(owner: str) -> bool:
    """Whether the process that a label names has ended; False when that cannot be known."""
    namespace, pid, _ = owner.split()
    if namespace != str(Path("/proc/self/ns/pid").readlink()):
        return False
    try:
        os.kill(int(pid), 0)  # asks only whether it exists
        return owner_of(int(pid)) != owner
    except ProcessLookupError:
        return True
    except OSError:  # another user's, which /proc may hide from us
        return False
