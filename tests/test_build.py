"""The whole line with the real tools, on a tiny random model."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.registry.store import ENVELOPE
from pipeline.registry.trust.signing import can_sign_models
from tests.tiny_recipe import QUICK, Workplace

CARD = "NVIDIA-GeForce-RTX-4090"
VARIANT = "sm89-trtrtx-fp8-b2-s128"


@pytest.fixture
def place(built: Workplace, tmp_path: Path) -> Workplace:
    """The same place, to work in."""
    return built.copy(tmp_path / "place")


@pytest.fixture
def unpublished(built: Workplace, tmp_path: Path) -> Workplace:
    """A place with a warm cache and no packages."""
    return built.copy(tmp_path / "place", packages=False)


def statements(place: Workplace) -> list[Path]:
    """Test results; the signatures of builds lie beside them."""
    return sorted(place.artifacts.glob("*/*/*.statements/test-*"))


def started(log: str) -> set[str]:
    return {line.split()[-2].rstrip(":") for line in log.splitlines() if line.endswith(": started")}


def test_build_leaves_one_sealed_package_its_statement_and_its_pointer(built: Workplace) -> None:
    (package,) = built.packages()
    name = package.name
    (statement,) = statements(built)
    below = {
        path.relative_to(built.artifacts).as_posix()
        for path in built.artifacts.rglob("*")
        if path.is_file() and not path.relative_to(built.artifacts).parts[0].startswith(".")
    }
    engine = f"tiny/{VARIANT}/{name}/engine"
    beside = f"tiny/{VARIANT}/{name}.statements"
    (signature,) = package.parent.glob("*.statements/signature-*")
    (provenance,) = package.parent.glob("*.statements/provenance-*")
    (move,) = package.parent.glob("channels/log/*.dsse.json")
    model_sig = [f"{beside}/{signature.name}/model.sig"] if can_sign_models() else []
    assert below == {
        "registry.json",
        f"tiny/{VARIANT}/{name}/manifest.json",
        *(
            f"{engine}/{file}"
            for file in (
                "LICENSE",
                "chat_template.jinja",
                "config.json",
                "generation_config.json",
                "model.engine",
                "tokenizer.json",
                "tokenizer_config.json",
            )
        ),
        f"{beside}/{statement.name}/report.json",
        f"{beside}/{statement.name}/junit.xml",
        f"{beside}/{statement.name}/report.html",
        f"{beside}/{statement.name}/{ENVELOPE}",
        f"{beside}/{signature.name}/{ENVELOPE}",
        f"{beside}/{provenance.name}/{ENVELOPE}",
        *model_sig,
        f"tiny/{VARIANT}/channels/candidate.{CARD}.json",
        f"tiny/{VARIANT}/channels/log/{move.name}",
    }
    assert built.leftovers() == []


def test_verdict_report_manifest_and_channel_name_the_same_digest(built: Workplace) -> None:
    (package,) = built.packages()
    digest = hashlib.sha256((package / "manifest.json").read_bytes()).hexdigest()
    verdict = built.verdict()
    report = json.loads((statements(built)[0] / "report.json").read_text())
    channel = (package.parent / "channels" / f"candidate.{CARD}.json").read_text()
    assert verdict["exit_code"] == 0
    assert verdict["verdict"] == report["verdict"] == "checked"
    assert verdict["reference"] == f"tiny/{VARIANT}:{package.name}"
    assert verdict["digest"].removeprefix("sha256:") == digest
    assert report["digest"].removeprefix("sha256:") == digest
    assert digest in channel
    assert str(built.root) not in (package / "manifest.json").read_text()


def test_report_shows_what_was_measured_proven_and_not_run(built: Workplace) -> None:
    report = json.loads((statements(built)[0] / "report.json").read_text())
    assert report["card"] == CARD
    assert any(CARD in what for what in report["not_run"])
    assert report["speed"] == []
    assert report["quality"]["tokens"] == 4 * 63
    assert 0.0 < report["quality"]["mean_kl_nats"]["value"] < 0.2
    assert set(report["checks"]) == {"plan", "network"}


def test_second_run_takes_the_package_without_a_stage_or_torch(place: Workplace) -> None:
    before = [path.stat().st_mtime_ns for path in place.packages()]
    command = place.command("build", "tiny", "--config-dir", str(place.recipes))
    command[1:1] = ["-X", "importtime"]
    done = subprocess.run(
        command, cwd=place.root, env=place.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Taken, published before: tiny/" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "pipeline.config.recipe" in imported  # so the list is there
    assert not imported & {"torch", "modelopt", "transformers", "onnxruntime", "tensorrt_rtx"}
    assert started(place.log()) == set()
    assert place.verdict()["taken"] is True
    assert [path.stat().st_mtime_ns for path in place.packages()] == before
    assert len(statements(place)) == 1


def test_other_acceptance_is_asked_of_the_same_package_and_nothing_is_made_again(
    place: Workplace,
) -> None:
    done = place.build("acceptance.max_mean_kl_nats=900.0", "acceptance.chat=null")
    assert done.returncode == 0, done.stderr
    assert started(place.log()) == set()
    assert len(place.packages()) == 1
    assert len(statements(place)) == 2
    digests = {json.loads((s / "report.json").read_text())["digest"] for s in statements(place)}
    assert len(digests) == 1


def test_missed_target_is_told_and_publishes_nothing(unpublished: Workplace) -> None:
    done = unpublished.build("acceptance.max_mean_kl_nats=1.0e-9", "acceptance.chat=null")
    verdict = unpublished.verdict()
    assert done.returncode == verdict["exit_code"] == 3, done.stderr
    assert verdict["verdict"] == "regression"
    assert verdict["reference"] is None
    assert "mean KL" in done.stdout
    report = json.loads((unpublished.root / verdict["report"]).read_text())
    assert report["verdict"] == "regression"
    assert next(f["kind"] for f in report["findings"]) == "regression"
    assert unpublished.packages() == []
    assert statements(unpublished) == []
    assert not list(unpublished.artifacts.rglob("candidate.*"))
    assert unpublished.leftovers() == []


def test_rebuild_of_the_same_bytes_is_the_same_version_and_of_others_is_another(
    place: Workplace,
) -> None:
    again = ("--rebuild", "acceptance.time_limit_s=1e-6")
    (first,) = place.packages()
    assert place.build(*again).returncode == 0
    assert place.packages() == [first]
    assert place.verdict()["taken"] is True
    (plan,) = place.cache.glob("stages/compile-trtrtx/*/engine/model.engine")
    shutil.rmtree(plan.parents[1])  # a compiler is not deterministic: its bytes may be others
    assert place.build(*again).returncode == 0
    assert first in place.packages()
    assert {path.name[:12] for path in place.packages()} == {first.name[:12]}


@pytest.mark.slow
def test_two_builds_at_once_end_with_one_package(
    built_checkpoint: Workplace, tmp_path: Path
) -> None:
    place = built_checkpoint.copy(tmp_path / "place", packages=False)
    shutil.rmtree(place.cache / "stages" / "pack")
    command = place.command("build", "tiny", *QUICK, "--config-dir", str(place.recipes))
    processes = [
        subprocess.Popen(
            command, cwd=place.root, env=place.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # One of them made it; the other waited or came later.
    assert sum(output.count(" pack: started") for output in outputs) == 1, outputs
    assert sum("Taken, published before" in output for output in outputs) == 1
    assert len(place.packages()) == len(statements(place)) == 1
    assert place.leftovers() == []


def test_model_too_slow_for_the_time_limit_is_compiled_with_its_cut_checked(
    unpublished: Workplace,
) -> None:
    done = unpublished.build("acceptance.time_limit_s=1e-6")
    assert done.returncode == 0, done.stderr
    assert unpublished.verdict()["verdict"] == "compiled"
    report = json.loads((statements(unpublished)[0] / "report.json").read_text())
    cut = report["checks"]["two_layer_cut"]
    assert cut["median_difference"] <= max(1e-3, 2 * cut["median_noise"])
    assert any("whole model" in what for what in report["not_run"])
    assert report["quality"] == {}
    assert report["speed"] == []


def test_damaged_stage_is_made_again(unpublished: Workplace) -> None:
    files = [path for path in unpublished.cache.glob("stages/convert/*/*") if path.is_file()]
    graph = max(files, key=lambda path: path.stat().st_size)
    graph.write_bytes(graph.read_bytes()[:-1] + b"\x5a")
    done = unpublished.build("acceptance.time_limit_s=1e-6")
    assert done.returncode == 0, done.stderr
    assert "is damaged; making it again" in done.stderr
    assert started(unpublished.log()) == {"convert"}
