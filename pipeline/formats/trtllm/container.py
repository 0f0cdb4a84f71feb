"""A tool in a container, on the same terms as `pipeline.core.process.run_tool` on this machine.

The container has no network, writes as the caller, sees only what is mounted, and is removed
whatever happens; what a killed process leaves behind, the next run removes: each container names
its owner in a label.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import IncompatibleError, PipelineError, ToolError
from pipeline.core.process import Started, last_lines
from pipeline.formats.trtllm.docker_engine import connect
from pipeline.formats.trtllm.preflight import NO_GPU_RUNTIME, require_image

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container as Handle
    from docker.types import CancellableStream

log = logging.getLogger(__name__)

OWNER_LABEL = "enginesmith.owner"
_HOME = "/home/enginesmith"
_GRACE_S = 3
_SETTLE_S = 60  # the output ends a moment before the engine notes the exit code
_TAIL_BYTES = 4096


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


def run_container(
    container: Container,
    *,
    stage: str,
    log_path: Path,
    timeout_s: float = 24 * 3600.0,
    heartbeat_s: float = 15.0,
) -> None:
    """Run a container to its end; its output is appended to `log_path` as it comes.

    Args:
        container: What to run.
        stage: Names the work in messages.
        log_path: Gets the command line, then everything that the program prints.
        timeout_s: After this long it is stopped.
        heartbeat_s: How often a line says that it still runs, and what it printed last.

    Raises:
        ToolError: It exited non-zero, a process of it hit the memory limit, or time ran out.
        IncompatibleError: No engine, image or GPU runtime, or the engine sees other folders.
        AccessError: The user may not use Docker.
        PipelineError: The engine could not start it, or went away.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with connect() as client:
        require_image(client, container.image)
        remove_stale(client)
        with log_path.open("ab") as stream:
            stream.write(f"$ {list(container.command)!r} in {container.image}\n".encode())
        name = f"enginesmith-{stage}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            handle, chunks = _start(client, container, name, stage)
            copy = _LogCopy(chunks, log_path)
            timed_out = _follow(handle, copy, stage, timeout_s, heartbeat_s)
            handle.reload()
            state = handle.attrs["State"]
        finally:
            remove(client, name)
    if timed_out or state["OOMKilled"] or state["ExitCode"] != 0:
        raise ToolError(
            stage=stage,
            command=container.command,
            returncode=state["ExitCode"],
            log_path=log_path,
            last_lines=last_lines(log_path),
            hint=f"it was stopped after {timeout_s:.0f} s"
            if timed_out
            else _hint(container, state["ExitCode"], oom=state["OOMKilled"]),
        )


@contextlib.contextmanager
def interactive_container(container: Container, *, stage: str) -> Iterator[Started]:
    """The `docker run` that joins a container's standard streams, for the caller to start.

    Leaving the context removes the container, whatever became of the command.

    Args:
        container: What to run.
        stage: Names the work in the container's name.

    Raises:
        IncompatibleError: No `docker` program, engine or image.
        AccessError: The user may not use Docker.
    """
    if shutil.which("docker") is None:
        raise IncompatibleError(
            "the docker program is not on the PATH; install the Docker CLI beside its engine"
        )
    with connect() as client:
        require_image(client, container.image)
        remove_stale(client)
        name = f"enginesmith-{stage}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            yield Started(command=_docker_run(container, name))
        finally:
            remove(client, name)


def _docker_run(container: Container, name: str) -> tuple[str, ...]:
    """`docker run` with what `_start` asks of the engine."""
    options = [
        *("--interactive", "--init", "--name", name, "--log-driver", "none", "--network", "none"),
        *("--label", f"{OWNER_LABEL}={owner_of(os.getpid())}"),
        *("--user", f"{os.getuid()}:{os.getgid()}"),
        *("--tmpfs", f"{_HOME}:exec,mode=1777"),
    ]
    for key, value in {"HOME": _HOME, "USER": "enginesmith", **container.env}.items():
        options += ["--env", f"{key}={value}"]
    for item in container.shared:
        mount = f"type=bind,source={item.source.resolve()},target={item.target}"
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


def _start(
    client: DockerClient, container: Container, name: str, stage: str
) -> tuple[Handle, CancellableStream]:
    """Create and start it; what it prints. The caller removes it by name, also if this fails."""
    import docker

    types = docker.types
    try:
        handle = client.containers.create(
            container.image,
            list(container.command),
            name=name,
            labels={OWNER_LABEL: owner_of(os.getpid())},
            user=f"{os.getuid()}:{os.getgid()}",  # so that what it writes belongs to the caller
            # The image's /etc/passwd does not know the uid; getpass, and so torch, then asks USER.
            environment={"HOME": _HOME, "USER": "enginesmith", **container.env},
            tmpfs={_HOME: "exec,mode=1777"},  # exec: Triton loads what it compiled below HOME
            # `volumes` would make an empty folder where a source is missing.
            mounts=[
                types.Mount(item.target, str(item.source.resolve()), "bind", item.read_only)
                for item in container.shared
            ],
            init=True,  # reaps, and passes SIGTERM on
            network_mode="none",
            mem_limit=container.memory_bytes,
            memswap_limit=container.memory_bytes,
            shm_size=container.shm_bytes,
            device_requests=[types.DeviceRequest(count=-1, capabilities=[["gpu"]])]
            if container.gpus
            else [],
            # The output is read as it comes. Docker's own log would be a second copy, and holds a
            # progress bar back until its line ends.
            log_config=types.LogConfig(type="none"),
        )
        chunks = handle.attach(stream=True)
        handle.start()
    except docker.errors.APIError as error:
        raise _start_fault(str(error.explanation or error), container, stage) from error
    return handle, chunks


def _start_fault(text: str, container: Container, stage: str) -> PipelineError:
    """The engine's answer, with the next step where the cause is known."""
    if "could not select device driver" in text:
        return IncompatibleError(NO_GPU_RUNTIME)
    if "nvidia-container" in text:
        return IncompatibleError(
            f"{stage}: NVIDIA's container runtime refused {container.image}: {text}; see whether "
            "nvidia-smi works here, and whether the driver is new enough for the image"
        )
    if "bind source path does not exist" in text:
        return IncompatibleError(
            f"{stage}: {text}; if it exists here, the Docker engine sees another file system (that "
            "of a host around this container, or of a virtual machine): use a folder that both see"
        )
    return PipelineError(f"{stage}: Docker could not start {container.image}: {text}")


class _LogCopy(threading.Thread):
    """Copies what a container prints into the log; a thread, as the stream knows no timeout."""

    def __init__(self, chunks: CancellableStream, path: Path) -> None:
        super().__init__(daemon=True)
        self._chunks = chunks
        self._path = path
        self._tail = b""
        self.fault: Exception | None = None

    def run(self) -> None:
        try:
            with self._path.open("ab", buffering=0) as stream:
                for chunk in self._chunks:
                    stream.write(chunk)
                    self._tail = (self._tail + chunk)[-_TAIL_BYTES:]
        except Exception as error:  # a full disk, an engine that died: raised by the main thread
            self.fault = error
            with contextlib.suppress(OSError):
                self._chunks.close()  # else the engine waits for a reader, also to remove it

    @property
    def last_line(self) -> str:
        """The last line with something on it; the newest state of a progress bar counts as one."""
        text = self._tail.decode("utf-8", errors="replace").replace("\r", "\n")
        lines = ("".join(filter(str.isprintable, line)).strip() for line in text.split("\n"))
        return ([line for line in lines if line] or ["nothing printed yet"])[-1]


def _follow(
    handle: Handle, copy: _LogCopy, stage: str, timeout_s: float, heartbeat_s: float
) -> bool:
    """Copy the output until the container ends; True if it ran out of time and was stopped."""
    copy.start()
    started = time.monotonic()
    next_beat = started + heartbeat_s
    timed_out = False
    try:
        while copy.is_alive() and not timed_out:
            copy.join(timeout=max(0.01, min(next_beat, started + timeout_s) - time.monotonic()))
            elapsed_s = time.monotonic() - started
            timed_out = copy.is_alive() and elapsed_s >= timeout_s
            if time.monotonic() >= next_beat:
                log.info("%s: still running after %.0f s: %s", stage, elapsed_s, copy.last_line)
                next_beat += heartbeat_s
    except KeyboardInterrupt:
        handle.stop(timeout=_GRACE_S)
        raise
    if timed_out:
        handle.stop(timeout=_GRACE_S)
        copy.join(timeout=_SETTLE_S)
    if copy.fault is not None:
        raise copy.fault
    handle.wait(timeout=_SETTLE_S)
    return timed_out


def _hint(container: Container, returncode: int, *, oom: bool) -> str:
    """What to change, where the exit code alone does not tell."""
    if oom:
        limit = f" of {container.memory_bytes / 1e9:.2f} GB" if container.memory_bytes else ""
        return (
            f"a process in the container was killed at its memory limit{limit}, so the output is "
            "not whole; allow it more memory, or give it less to do"
        )
    if returncode == 137:  # 128 + SIGKILL
        return (
            "it was killed from outside: this machine ran out of memory (see dmesg), or the "
            "container was stopped by hand"
        )
    return f"a program is missing in {container.image}" if returncode == 127 else ""


def remove(client: DockerClient, name: str) -> None:
    """Remove a container, running or not; should that fail, it hides no other error."""
    import docker
    import requests

    try:
        client.api.remove_container(name, force=True, v=True)
    except docker.errors.NotFound:
        pass
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        log.warning("A container is left; remove it: docker rm -f %s (%s)", name, error)


def remove_stale(client: DockerClient) -> None:
    """Remove the containers that killed processes of this machine left behind."""
    labelled = {"label": OWNER_LABEL}
    for handle in client.containers.list(all=True, filters=labelled, ignore_removed=True):
        if is_stale(handle.labels[OWNER_LABEL]):
            log.warning("Removing %s, left behind by a run that was killed", handle.name)
            remove(client, handle.name)


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
