"""Where TensorRT-LLM's programs run: on this machine, or in a container of the build image.

    place = choose_place("auto", image=image, card=lambda: find_card(target))
    place.run([..., place.path(engine)], [checkpoint, engine], stage="compile", log_path=log)

Both run the same command; only the paths in it differ. Nothing reaches the network: a container has
none, and on this machine the Hub's clients are told to stay offline.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.core.errors import IncompatibleError
from pipeline.core.gpu import Gpu, find_gpu, probe_gpus
from pipeline.core.hardware import Target, card_name
from pipeline.core.process import Started, run_tool
from pipeline.formats.trtllm.container import (
    Container,
    Shared,
    interactive_container,
    preflight,
    run_container,
)
from pipeline.formats.trtllm.release import BUILD_PROGRAM, SHM_BYTES, VERSION

Where = Literal["auto", "local", "docker"]

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Runs TensorRT-LLM's programs.

    Attributes:
        gpu: The one card that they see.
        program: Path of `trtllm-build` on this machine, which is usually the inside of the build
            image; None for a container of `image`.
        image: Name with tag or digest; empty on this machine.
        image_digest: Its identity; empty on this machine.
        memory_bytes: Limit of a container's memory; None for none.
    """

    gpu: Gpu
    program: Path | None = None
    image: str = ""
    image_digest: str = ""
    memory_bytes: int | None = None

    @property
    def python(self) -> str:
        """The interpreter that has TensorRT-LLM.

        On this machine the one that pip wrote into the program's first line, else our own.
        """
        if self.program is None:
            return "python3"
        with self.program.open("rb") as stream:
            first = stream.readline(4096).decode("utf-8", errors="replace")
        words = first.removeprefix("#!").split() if first.startswith("#!") else []
        known = words and "python" in Path(words[0]).name and Path(words[0]).is_file()
        return words[0] if known else sys.executable

    def path(self, shared: Shared) -> str:
        """Where a program finds it."""
        return shared.target if self.program is None else str(shared.source)

    def run(
        self,
        command: Sequence[str],
        shared: Sequence[Shared],
        *,
        stage: str,
        log_path: Path,
        timeout_s: float,
    ) -> None:
        """Run a program to its end; its output is appended to `log_path`.

        Args:
            command: Program and arguments, with paths from `path`.
            shared: All that it sees of this machine's files.
            stage: Names the work in messages.
            log_path: Gets the command line and the output.
            timeout_s: After so long it is stopped.

        Raises:
            ToolError: It failed, ran out of memory or ran out of time.
            IncompatibleError: The container could not be started here.
        """
        if self.program is None:
            container = self._container(command, shared)
            run_container(container, stage=stage, log_path=log_path, timeout_s=timeout_s)
            return
        with self._local(command) as local:
            run_tool(
                local.command, stage=stage, log_path=log_path, env=local.env, timeout_s=timeout_s
            )

    def interactive(
        self, command: Sequence[str], shared: Sequence[Shared], *, stage: str
    ) -> AbstractContextManager[Started]:
        """What starts a program that the caller speaks with over its standard streams.

        Leaving the context removes what was made for it; the caller has ended it by then. The
        arguments are those of `run`.

        Raises:
            IncompatibleError: No `docker` program or engine.
        """
        if self.program is None:
            return interactive_container(self._container(command, shared), stage=stage)
        return self._local(command)

    @property
    def _env(self) -> dict[str, str]:
        return {**_OFFLINE, "CUDA_VISIBLE_DEVICES": self.gpu.uuid}

    @contextlib.contextmanager
    def _local(self, command: Sequence[str]) -> Iterator[Started]:
        """On this machine: a caller with a foreign uid in an image has a HOME it cannot write."""
        with tempfile.TemporaryDirectory(prefix="enginesmith-home-") as home:
            yield Started(command=tuple(command), env={**self._env, "HOME": home})

    def _container(self, command: Sequence[str], shared: Sequence[Shared]) -> Container:
        return Container(
            image=self.image,
            command=tuple(command),
            shared=tuple(shared),
            env=self._env,
            memory_bytes=self.memory_bytes,
            shm_bytes=SHM_BYTES,
            gpus=True,
        )


def choose_place(
    where: Where,
    *,
    image: str,
    card: Callable[[], Gpu],
    memory_bytes: int | None = None,
    section: str = "compiler",
) -> Place:
    """Choose where to run, and make every check that needs no download and starts nothing.

    `auto` takes this machine when `trtllm-build` is on the PATH, else Docker.

    Args:
        where: The recipe's wish.
        image: The build image.
        card: Finds the card that is needed, or raises IncompatibleError.
        memory_bytes: Limit of a container's memory; None for none.
        section: Section of the recipe that holds the wish, for messages.

    Raises:
        IncompatibleError: No program, card, driver, engine or image for it.
        AccessError: The user may not use Docker.
    """
    program = shutil.which(BUILD_PROGRAM)
    if where != "docker" and program:
        return Place(gpu=card(), program=Path(program))
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
    return Place(gpu=gpu, image=image, image_digest=digest, memory_bytes=memory_bytes)


def find_card(target: Target) -> Gpu:
    """The target's own card in this machine.

    Another card of the same SM will not do: kernels are chosen by timing, and the package says
    which card it was tuned for.

    Raises:
        IncompatibleError: It is not here; says what is.
    """
    gpus = probe_gpus()
    for gpu in gpus:
        if gpu.sm == target.sm and card_name(gpu.name) == target.card:
            return gpu
    found = find_gpu(target.sm)
    raise IncompatibleError(
        f"the target {target.id} is {target.card}, this machine has {card_name(found.name)}: the "
        f"same sm_{target.sm}, but TensorRT chooses kernels by timing them, so an engine is built "
        "on the card that it is for; build there, or choose the target that is here (target=NAME)"
    )
