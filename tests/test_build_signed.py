"""Who signs what `enginesmith build` publishes, and which published packages it takes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from pipeline.registry.trust.signing import can_sign_models
from tests.tiny_recipe import QUICK, Workplace

CARD = "NVIDIA-GeForce-RTX-4090"


@pytest.fixture
def place(built_checkpoint: Workplace, tmp_path: Path) -> Workplace:
    """The same place, to work in."""
    return built_checkpoint.copy(tmp_path / "place")


def _statements(package: Path) -> dict[str, Path]:
    """Kind of statement -> folder of the last one by name."""
    folder = package.with_name(f"{package.name}.statements")
    return {path.name.partition("-")[0]: path for path in sorted(folder.iterdir())}


def _names(place: Workplace) -> list[str]:
    return [package.name for package in place.packages()]


def test_plain_build_is_signed_by_this_machines_key_and_verifies(
    built_checkpoint: Workplace,
) -> None:
    built = built_checkpoint
    (package,) = built.packages()
    statements = _statements(package)
    assert set(statements) == {"signature", "provenance", "test"}
    assert (statements["signature"] / "model.sig").exists() is can_sign_models()
    assert {path.name for path in statements["test"].iterdir()} == {
        "statement.dsse.json", "report.json", "report.html", "junit.xml",
    }  # fmt: skip
    done = built.run("verify", built.verdict()["reference"], "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["signer"]["name"] == "this machine's own key"
    assert answer["builder_id"] == "https://enginesmith.dev/builder/local/v1"
    assert [(one["card"], one["verdict"]) for one in answer["verdicts"]] == [(CARD, "checked")]
    assert answer["ignored"] == []


def test_ci_without_a_key_is_refused_before_any_work(place: Workplace, tmp_path: Path) -> None:
    shutil.rmtree(place.artifacts)
    shutil.rmtree(place.cache)
    done = place.build(*QUICK, CI="true", ENGINESMITH_CONFIG=str(tmp_path / "config"))
    assert done.returncode == 2
    assert "ENGINESMITH_SIGNING_KEY" in done.stderr
    assert "enginesmith keygen" in done.stderr
    assert not (tmp_path / "config").exists()
    assert not place.cache.exists()
    assert place.packages() == []


@pytest.mark.parametrize("whose", ["none", "another machine's"])
def test_a_package_without_a_trusted_signature_is_built_again_and_then_signed(
    place: Workplace, tmp_path: Path, whose: str
) -> None:
    (package,) = place.packages()
    environ = {}
    if whose == "none":
        shutil.rmtree(package.with_name(f"{package.name}.statements"))
    else:
        environ["ENGINESMITH_CONFIG"] = str(tmp_path)
    before = (package / "manifest.json").stat().st_mtime_ns
    done = place.build(*QUICK, **environ)
    assert done.returncode == 0, done.stderr
    assert "does not stand for this build" in done.stderr
    # A checkpoint has the same bytes again, so it is the same version; nothing of it is rewritten.
    assert _names(place) == [package.name]
    assert (package / "manifest.json").stat().st_mtime_ns == before
    assert place.run("verify", f"tiny:{package.name}", **environ).returncode == 0
    key = tmp_path / "local.key"
    assert (f"Made a key for this machine's own packages: {key}" in done.stderr) is key.exists()
    if whose != "none":
        assert key.stat().st_mode & 0o777 == 0o600
        assert "Made a key" not in place.build(*QUICK, **environ).stderr
        private = key.read_bytes().splitlines()[1]
        files = [path.read_bytes() for path in place.artifacts.rglob("*") if path.is_file()]
        assert not any(private in content for content in files)


def test_a_test_result_that_is_not_trusted_is_asked_again(place: Workplace) -> None:
    (package,) = place.packages()
    envelope = _statements(package)["test"] / "statement.dsse.json"
    envelope.chmod(0o644)
    envelope.write_bytes(envelope.read_bytes().replace(b"payload", b"payroll"))
    done = place.build(*QUICK)
    assert done.returncode == 0, done.stderr
    assert "a statement does not count: test-" in done.stderr
    answer = json.loads(place.run("verify", f"tiny:{package.name}", "--json").stdout)
    assert [one["verdict"] for one in answer["verdicts"]] == ["checked"]


@pytest.mark.parametrize("tested", [False, True])
def test_run_that_was_stopped_after_publishing_is_completed_by_the_next(
    place: Workplace, tested: bool
) -> None:
    (package,) = place.packages()
    if not tested:
        shutil.rmtree(_statements(package)["test"])
    shutil.rmtree(package.parent / "channels")
    done = place.build(*QUICK)
    assert done.returncode == 0, done.stderr
    assert _names(place) == [package.name]
    assert place.verdict()["taken"] is True
    assert place.run("verify", "tiny:candidate").returncode == 0


def test_yanked_build_is_refused_before_any_work_until_the_yank_is_undone(
    place: Workplace,
) -> None:
    reference = place.verdict()["reference"]
    stages = (place.cache / "stages").rename(place.root / "stages")  # so that work would show
    yank = ("yank", reference, "--reason", "crashes at batch 2")
    assert place.run(*yank, ENGINESMITH_ACTOR="ada").returncode == 0
    done = place.build(*QUICK)
    assert done.returncode == 5, done.stderr
    message = place.verdict()["message"]
    assert f"{reference} was yanked by ada at " in message
    assert ": crashes at batch 2; " in message
    assert not (place.cache / "stages").exists()
    stages.rename(place.cache / "stages")
    rebuilt = place.build(*QUICK, "--rebuild")  # the same bytes do not get round the yank
    assert (rebuilt.returncode, "yanked" in rebuilt.stderr) == (5, True), rebuilt.stderr
    advice = re.search(r"enginesmith (yank .* --registry \S+)", message.replace(", or", " "))
    assert advice is not None
    assert place.run(*shlex.split(advice[1])).returncode == 0
    done = place.build(*QUICK)
    assert done.returncode == 0, done.stderr
    assert place.verdict()["reference"] == reference
