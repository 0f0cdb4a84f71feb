"""The build image's containers, through the `docker` command.

A container has no network, writes as the caller, sees only what is mounted, and is removed whatever
happens; what a killed process leaves behind, the next run removes: each container names its owner
in a label. Only a local engine will do: one behind tcp:// or ssh:// would look for the folders that
we mount on its own disk.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import AccessError, IncompatibleError, PipelineError, ToolError
from pipeline.core.gpu import Gpu
from pipeline.core.process import Started, last_lines, run_tool
from pipeline.formats.trtllm.release import CUDA, OLDEST_DRIVER

log = logging.getLogger(__name__)

OWNER_LABEL = "enginesmith.owner"
_HOME = "/home/enginesmith"
_ANSWER_TIMEOUT_S = 300.0
_DOCKER_FAILED = 125
"""Exit code of `docker run` where Docker failed and not the program in the container."""

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
    """A file or folder of this machine that a program sees.

    Attributes:
        name: Tells it from the others of the same run; its place in a container.
        source: Where it is on this machine.
        read_only: Whether a container may only read it.
    """

    name: str
    source: Path
    read_only: bool = True

    @property
    def target(self) -> str:
        """Where a container has it."""
        return f"/mnt/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Container:
    """What to run, and in what.

    Attributes:
        image: Name with tag or digest; must be on this machine.
        command: Program and arguments, never a shell string.
        shared: All that the container sees of this machine.
        env: Variables in addition to the image's; HOME is a private folder in memory.
        memory_bytes: Limit of its memory, swap included; None for no limit.
        shm_bytes: Size of /dev/shm; None for Docker's 64 MB.
        gpus: Whether it gets the machine's GPUs; CUDA_VISIBLE_DEVICES in `env` narrows them.
    """

    image: str
    command: tuple[str, ...]
    shared: tuple[Shared, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    memory_bytes: int | None = None
    shm_bytes: int | None = None
    gpus: bool = False


def preflight(image: str, gpu: Gpu) -> str:
    """Make every check that starts nothing, those first that having the image would not cure.

    Returns:
        What a manifest records of the image: `repository@sha256:…`, for one built here its id.

    Raises:
        IncompatibleError: Engine, GPU runtime, driver or image is missing, too old or remote.
        AccessError: The user may not use Docker.
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
    """Demand that Docker can hand out GPUs, by what `docker info` tells of the engine.

    Raises:
        IncompatibleError: It has no NVIDIA runtime and no NVIDIA CDI device, and we see no hook.
    """
    known = json.dumps([info.get("Runtimes"), info.get("DiscoveredDevices")])
    if not (
        re.search(r'"nvidia"|"nvidia\.com/gpu', known)
        or any(shutil.which(hook) for hook in _GPU_HOOKS)
    ):
        raise IncompatibleError(_NO_GPU_RUNTIME)


def require_driver(gpu: Gpu) -> None:
    """Demand an NVIDIA driver (such as `580.65.06`) that runs the image's CUDA.

    Raises:
        IncompatibleError: It is older.
    """
    major = gpu.driver.partition(".")[0]
    if not major.isdigit() or int(major) < OLDEST_DRIVER:
        raise IncompatibleError(
            f"{gpu.name}: driver {gpu.driver} is too old for CUDA {CUDA}, which needs "
            f"{OLDEST_DRIVER} or newer; install a newer driver"
        )


def run_container(
    container: Container,
    *,
    stage: str,
    log_path: Path,
    timeout_s: float = 24 * 3600.0,
) -> None:
    """Run a container to its end, on the terms of `pipeline.core.process.run_tool`.

    Args:
        container: What to run.
        stage: Names the work in messages.
        log_path: Gets the command line, then everything that the program prints.
        timeout_s: After this long it is stopped.

    Raises:
        ToolError: It exited non-zero, a process of it hit the memory limit, or time ran out.
        IncompatibleError: No engine, image or GPU runtime, or the engine sees other folders.
        AccessError: The user may not use Docker.
        PipelineError: The engine could not start it, or went away.
    """
    with _own_name(stage) as name:
        command, failure = _docker_run(container, name), None
        try:
            run_tool(command, stage=stage, log_path=log_path, timeout_s=timeout_s)
        except ToolError as error:
            failure = error
        if failure is not None and failure.returncode == _DOCKER_FAILED:
            raise _fault("\n".join(last_lines(log_path, 3)), container.image) from failure
        # A killed child of the program may leave the program's own exit code at 0.
        if _docker("inspect", "--format", "{{.State.OOMKilled}}", name) == "true":
            raise ToolError(
                stage=stage,
                command=command,
                returncode=failure.returncode if failure else 0,
                log_path=log_path,
                last_lines=last_lines(log_path),
                hint="a process in the container was killed at its memory limit, so the output is "
                "not whole; allow it more memory, or give it less to do",
            ) from failure
        if failure is not None:
            raise failure


@contextlib.contextmanager
def interactive_container(container: Container, *, stage: str) -> Iterator[Started]:
    """The `docker run` that joins a container's standard streams, for the caller to start.

    Leaving the context removes the container, whatever became of the command.

    Args:
        container: What to run.
        stage: Names the work in the container's name.

    Raises:
        IncompatibleError: No `docker` program or engine.
        AccessError: The user may not use Docker.
    """
    with _own_name(stage) as name:
        yield Started(command=_docker_run(container, name))


@contextlib.contextmanager
def _own_name(stage: str) -> Iterator[str]:
    """A new container's name; leaving the context removes what has it, running or not."""
    _remove_stale()
    name = f"enginesmith-{stage}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        yield name
    finally:
        _remove(name)


def _docker_run(container: Container, name: str) -> tuple[str, ...]:
    options = [
        *("--name", name, "--pull", "never", "--network", "none", "--interactive"),
        "--init",  # reaps, and passes SIGTERM on
        # The output is read as it comes; Docker's own log would be a second copy.
        *("--log-driver", "none"),
        *("--label", f"{OWNER_LABEL}={owner_of(os.getpid())}"),
        *("--user", f"{os.getuid()}:{os.getgid()}"),  # what it writes belongs to the caller
        *("--tmpfs", f"{_HOME}:exec,mode=1777"),  # exec: Triton loads what it compiled below HOME
    ]
    # The image's /etc/passwd does not know the uid; getpass, and so torch, then asks USER.
    for key, value in {"HOME": _HOME, "USER": "enginesmith", **container.env}.items():
        options += ["--env", f"{key}={value}"]
    for item in container.shared:
        source = str(item.source.resolve()).replace('"', '""')
        # `--volume` would make an empty folder where a source is missing; quoted as CSV.
        mount = f'type=bind,"source={source}",target={item.target}'
        options += ["--mount", f"{mount},readonly" if item.read_only else mount]
    chosen = {
        "--memory": container.memory_bytes,
        "--memory-swap": container.memory_bytes,
        "--shm-size": container.shm_bytes,
        "--gpus": "all" if container.gpus else None,
    }
    for flag, setting in chosen.items():
        if setting:
            options += [flag, str(setting)]
    return ("docker", "run", *options, container.image, *container.command)


def _docker(*arguments: str) -> str:
    """What a short `docker` command prints.

    Raises:
        PipelineError: It failed; of the kind and with the advice that `_CAUSES` has.
    """
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


def _remove(name: str) -> None:
    """Remove a container; should that fail, it hides no other error."""
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
    """Names a process beyond its end: PID namespace, id, start in ticks since boot.

    The namespace, because in another one (a container with the engine's socket) the same id means
    another process; the start, because ids are used again.
    """
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
