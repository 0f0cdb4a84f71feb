"""`enginesmith copy` between all kinds of registries."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ConflictError, CorruptError, RecipeError, UntrustedError
from pipeline.core.values import Reference
from pipeline.registry.copying import CopyRequest, run_copy
from pipeline.registry.signing.machine import signatory_for
from pipeline.registry.signing.signer import sign_report
from pipeline.registry.signing.verification import verify_signatures
from pipeline.registry.stores.folder import FolderStore
from pipeline.registry.stores.opening import open_registry
from pipeline.registry.stores.store import Place, WritableStore
from tests.registry.backends import Backends, backends, running_backends
from tests.registry.signing.conftest import Signed

Bench = Any
ROOT = Path(__file__).parents[2]
CARD = "NVIDIA-GeForce-RTX-4090"


@pytest.fixture(scope="module")
def servers() -> Iterator[Backends]:
    with running_backends() as made:
        yield made


@pytest.fixture
def signed(bench: Bench, tmp_path: Path) -> Signed:
    return Signed(bench=bench, home=tmp_path / "home")


def _copy(signed: Signed, source: str, target: str, text: str, **more: Any) -> Any:
    request = CopyRequest(
        reference=text, source=source, target=target, policy=signed.write_policy(), **more
    )
    return run_copy(request, {**os.environ, "ENGINESMITH_CONFIG": str(signed.home)})


def _source(signed: Signed) -> str:
    return str(signed.bench.registry.path)


def _all(store: WritableStore, reference: Reference) -> dict[str, dict[str, bytes]]:
    place = Place.of(reference)
    said = store.statements(place)
    return {one.name: store.read_statement(place, one.name) for one in said}


@pytest.mark.parametrize("backend", backends)
def test_copy_has_the_same_digest_signatures_and_verdicts_there_and_back(
    backend: str,
    signed: Signed,
    servers: Backends,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    reference = signed.publish()
    first = FolderStore(path=signed.bench.registry.path)
    there = servers.store(backend, tmp_path / "there")
    for name, value in servers.environ(backend).items():
        monkeypatch.setenv(name, value)

    done = _copy(signed, _source(signed), there.url, str(reference))
    assert (done.reference, done.new, done.signer) == (reference, True, "builder")
    assert _all(there, reference) == _all(first, reference)
    assert there.channels("tiny", reference.variant) == {}

    done = _copy(signed, there.url, str(tmp_path / "back"), f"tiny@sha256:{reference.digest}")
    back = open_registry(str(tmp_path / "back"))
    assert _all(FolderStore(path=tmp_path / "back"), reference) == _all(first, reference)
    verified = verify_signatures(
        back.resolve(str(reference)), back.statements_dir(reference), signed.policy()
    )
    assert [(one.card, one.verdict) for one in verified.verdicts] == [(CARD, "checked")]
    assert verified.ignored == ()

    again = _copy(signed, _source(signed), there.url, str(reference))
    assert (again.new, again.statements[0]) == (False, 0)


@pytest.mark.parametrize("backend", backends)
def test_newest_verdict_is_the_newest_in_the_copy(
    backend: str,
    signed: Signed,
    servers: Backends,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    reference = signed.publish()
    for number, (name, verdict) in enumerate([("z-old", "accepted"), ("a-new", "rejected")]):
        report = signed.bench.report(reference, verdict)
        files = {"report.json": report, **sign_report(report, signed.judge)}
        folder = signed.bench.registry.add_statement(reference, name, files)
        os.utime(folder, (2_000_000_000 + number, 2_000_000_000 + number))
    there = servers.store(backend, tmp_path / "there")
    for name, value in servers.environ(backend).items():
        monkeypatch.setenv(name, value)
    _copy(signed, _source(signed), there.url, str(reference))
    registry = open_registry(there.url)
    done = verify_signatures(
        registry.resolve(str(reference)), registry.statements_dir(reference), signed.policy()
    )
    newest = done.verdict(CARD)
    assert newest is not None
    assert newest.verdict == "rejected"
    assert [one.statement for one in done.verdicts] == ["a-new", "z-old", "test-1"]


def test_later_verdict_is_added_to_the_copy(signed: Signed, tmp_path: Path) -> None:
    reference = signed.publish()
    _copy(signed, _source(signed), str(tmp_path / "there"), str(reference))
    signed.accept(reference, name="test-2")
    done = _copy(signed, _source(signed), str(tmp_path / "there"), str(reference))
    assert (done.new, done.statements) == (
        False,
        (1, len(_all(FolderStore(path=tmp_path / "there"), reference))),
    )


def test_unsigned_package_is_copied_by_explicit_flag_only(signed: Signed, tmp_path: Path) -> None:
    reference = signed.bench.publish()
    target = tmp_path / "there"
    with pytest.raises(UntrustedError, match="--allow-unsigned"):
        _copy(signed, _source(signed), str(target), str(reference))
    assert not target.exists()
    done = _copy(signed, _source(signed), str(target), str(reference), allow_unsigned=True)
    assert (done.new, done.signer) == (True, None)


def test_local_key_counts_only_between_folders_of_this_machine(
    signed: Signed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"ENGINESMITH_CONFIG": str(tmp_path / "config")}
    key = signatory_for(environ, "run", own_folder=True).key
    reference = signed.bench.publish()
    signed.sign(reference, key)
    request = CopyRequest(
        reference=str(reference), source=_source(signed), target=str(tmp_path / "there")
    )
    assert run_copy(request, environ).signer == "this machine's local key"
    monkeypatch.setattr(FolderStore, "local", property(lambda self: "away" not in str(self.path)))
    with pytest.raises(UntrustedError, match="not trusted here"):
        run_copy(dataclasses.replace(request, target=str(tmp_path / "away")), environ)
    assert not (tmp_path / "away").exists()


def test_licence_that_forbids_it_keeps_a_package_out_of_public_registries(
    signed: Signed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = signed.publish()
    monkeypatch.setattr(FolderStore, "public", property(lambda self: True))
    with pytest.raises(RecipeError, match="everybody can read"):
        _copy(signed, _source(signed), str(tmp_path / "there"), str(reference))
    assert not (tmp_path / "there").exists()


def test_damaged_package_is_not_copied(signed: Signed, tmp_path: Path) -> None:
    reference = signed.publish()
    plan = signed.bench.registry.location(reference) / "engine" / "model.plan"
    plan.chmod(0o644)
    plan.write_bytes(b"nalp" * 100)
    with pytest.raises(CorruptError):
        _copy(signed, _source(signed), str(tmp_path / "there"), str(reference))
    assert not (tmp_path / "there").exists()


def test_other_bytes_in_the_target_are_a_conflict(signed: Signed, tmp_path: Path) -> None:
    reference = signed.publish()
    there = tmp_path / "there"
    _copy(signed, _source(signed), str(there), str(reference))
    (statement,) = there.glob("*/*/*.statements/test-1")
    (statement / "report.json").chmod(0o644)
    (statement / "report.json").write_bytes(b"{}")
    with pytest.raises(ConflictError, match="only ever added"):
        _copy(signed, _source(signed), str(there), str(reference))


def test_registry_is_not_copied_onto_itself(signed: Signed) -> None:
    with pytest.raises(RecipeError, match="same registry"):
        _copy(signed, _source(signed), _source(signed), "tiny:1.0")


def test_command_tells_programs_what_was_copied(signed: Signed, tmp_path: Path) -> None:
    reference = signed.publish()
    code = "import typer; from pipeline.commands.copy import copy; typer.run(copy)"
    done = subprocess.run(
        [
            sys.executable, "-c", code, str(reference), "--from", _source(signed),
            "--to", (tmp_path / "there").as_uri(), "--policy", str(signed.write_policy()), "--json",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["digest"], answer["new"], answer["exit_code"]) == (reference.digest, True, 0)
