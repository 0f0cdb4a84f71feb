from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import CorruptError, UntrustedError
from pipeline.core.values import Reference
from pipeline.registry.disk import move_into_place
from pipeline.registry.signing.attestations import provenance_statement, statement_bytes
from pipeline.registry.signing.envelope import STATEMENT_TYPE, sign_envelope
from pipeline.registry.signing.keys import generate_key
from pipeline.registry.signing.model_signature import available
from pipeline.registry.signing.signer import build_statements, sign_package, sign_report
from pipeline.registry.signing.trust import TrustPolicy
from tests.registry.signing.conftest import RUN, Signed, trusted

CARD = "NVIDIA-GeForce-RTX-4090"
with_models = pytest.mark.skipif(not available(), reason="the extra `sign` is not installed")


def _rewrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def _publish(signed: Signed, plan: bytes, *, stop: bool = False) -> Reference:
    """Publish with signatures, as a build does; `stop` dies before the package shows."""
    registry = signed.bench.registry
    with registry.staging() as staging:
        package = signed.bench.seal(staging, signed.bench.engine(plan))
        statements = build_statements(package, signed.builder, RUN)
        reference: Reference = registry.publish(package, statements)
    if stop:
        shutil.rmtree(registry.location(reference))
    return reference


def test_signatures_are_there_when_the_package_shows(
    signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def watched(private: Path, target: Path) -> bool:
        beside = target.with_name(f"{target.name}.statements")
        if target.parent.name != beside.name and not target.parent.name.endswith(".statements"):
            seen.append(sorted(path.name.partition("-")[0] for path in beside.iterdir()))
        return move_into_place(private, target)

    monkeypatch.setattr("pipeline.registry.stores.folder.move_into_place", watched)
    assert signed.check(_publish(signed, b"plan")).signer is not None
    assert seen == [["build", *(["model"] if available() else [])]]


def test_signatures_of_a_killed_run_with_other_bytes_do_not_stand_in_the_way(
    signed: Signed,
) -> None:
    killed = _publish(signed, b"other", stop=True)
    reference = _publish(signed, b"plan")
    assert (killed.version, killed.digest) != (reference.version, reference.digest)
    done = signed.check(reference)
    assert done.signer is not None
    assert done.signer.name == "builder"
    assert any("is not the one that builder signed" in reason for reason in done.ignored)


def test_signatures_of_a_killed_run_with_the_same_bytes_are_taken(signed: Signed) -> None:
    first = _publish(signed, b"plan", stop=True)
    before = {path: path.read_bytes() for path in signed.statements(first).glob("*/*")}
    reference = _publish(signed, b"plan")
    assert {path: path.read_bytes() for path in signed.statements(first).glob("*/*")} == before
    assert signed.check(reference).ignored == ()


def test_what_lies_under_a_signatures_name_is_not_believed(signed: Signed) -> None:
    with signed.bench.registry.staging() as staging:
        package = signed.bench.seal(staging)
        statements = build_statements(package, signed.builder, RUN)
        forged = {name: dict.fromkeys(files, b"{}") for name, files in statements.items()}
        reference = signed.bench.registry.publish(package, forged)
    with pytest.raises(UntrustedError, match="not a DSSE envelope"):
        signed.check(reference)


def test_package_that_is_published_already_gets_no_signature(signed: Signed) -> None:
    reference = signed.bench.publish()
    with signed.bench.registry.staging() as staging:
        package = signed.bench.seal(staging)
        signed.bench.registry.publish(package, build_statements(package, signed.builder, RUN))
    assert not signed.statements(reference).exists()


def _build(signed: Signed, reference: Any) -> Path:
    (folder,) = signed.statements(reference).glob("build-*")
    return folder


@with_models
def test_signed_package_says_who_signed_what(signed: Signed) -> None:
    reference = signed.publish()
    done = signed.check(reference)
    assert done.signer is not None
    assert done.signer.name == "builder"
    assert done.builder_id == RUN.builder_id
    assert done.model_signature == "verified"
    verdict = done.verdict(CARD)
    assert verdict is not None
    assert (verdict.verdict, verdict.signer.name) == ("checked", "judge")
    assert done.verdict("L4") is None
    assert done.ignored == ()


def test_signing_changes_nothing_in_the_package(signed: Signed) -> None:
    reference = signed.bench.publish()
    folder = signed.bench.registry.location(reference)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    signed.sign(reference)
    signed.accept(reference)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    private = signed.builder.private_pem().splitlines()[1]
    for path in signed.statements(reference).rglob("*"):
        assert path.is_dir() or private not in path.read_bytes()


def test_envelopes_of_the_same_build_have_the_same_bytes(signed: Signed) -> None:
    package = signed.bench.registry.resolve(str(signed.bench.publish()))
    first, again = (sign_package(package, signed.builder, RUN) for _ in range(2))
    assert first == again


def test_second_signer_signs_beside_the_first(signed: Signed) -> None:
    reference = signed.publish()
    second = generate_key()
    signed.sign(reference, second)
    only = TrustPolicy(keys=(trusted(second, "builds", "verdicts", name="second"),))
    with pytest.raises(UntrustedError, match="not trusted here"):
        signed.check(reference, only)  # its verdict is the judge's
    signed.accept(reference, second, name="test-2")
    done = signed.check(reference, only)
    assert done.signer is not None
    assert done.signer.name == "second"
    assert len(done.ignored) >= 3  # the builder's envelopes, the judge's verdict


def test_unsigned_package_needs_the_explicit_flag(signed: Signed) -> None:
    reference = signed.bench.publish()
    with pytest.raises(UntrustedError, match="--allow-unsigned"):
        signed.check(reference)
    done = signed.check(reference, allow_unsigned=True)
    assert (done.signer, done.builder_id, done.verdicts) == (None, None, ())


def test_unsigned_verdict_needs_the_explicit_flag_and_never_counts(signed: Signed) -> None:
    reference = signed.bench.publish()
    signed.sign(reference)
    signed.bench.accept(reference)
    with pytest.raises(UntrustedError, match="not signed"):
        signed.check(reference)
    done = signed.check(reference, allow_unsigned=True)
    assert done.verdicts == ()
    assert "not signed" in done.ignored[0]


def test_signature_by_an_unknown_key_is_refused_also_with_the_flag(signed: Signed) -> None:
    reference = signed.bench.publish()
    signed.sign(reference, generate_key())
    for allow in (False, True):
        with pytest.raises(UntrustedError, match="not trusted here"):
            signed.check(reference, allow_unsigned=allow)


def test_key_for_verdicts_may_sign_no_build(signed: Signed) -> None:
    reference = signed.bench.publish()
    signed.sign(reference, signed.judge)
    with pytest.raises(UntrustedError, match="may not sign builds, only verdicts"):
        signed.check(reference)


def test_key_for_builds_may_sign_no_verdict(signed: Signed) -> None:
    reference = signed.bench.publish()
    signed.sign(reference)
    signed.accept(reference, signed.builder)
    with pytest.raises(UntrustedError, match="may not sign verdicts, only builds"):
        signed.check(reference, allow_unsigned=True)


@pytest.mark.parametrize("prefix", ["", "sha256:"])
def test_revoked_key_counts_no_more(signed: Signed, prefix: str) -> None:
    reference = signed.publish()
    for key in (signed.builder, signed.judge):
        policy = signed.policy(revoked_keys=(prefix + key.public.keyid,))
        for allow in (False, True):
            with pytest.raises(UntrustedError, match="is revoked"):
                signed.check(reference, policy, allow_unsigned=allow)


def test_revoked_package_is_refused_whatever_is_allowed(signed: Signed) -> None:
    reference = signed.publish()
    other = signed.publish("2.0")
    policy = signed.policy(revoked_digests=(f"sha256:{reference.digest}",))
    for allow in (False, True):
        with pytest.raises(UntrustedError, match="is revoked"):
            signed.check(reference, policy, allow_unsigned=allow)
    assert signed.check(other, policy).signer


@pytest.mark.parametrize("allow", [False, True])
def test_signature_of_another_package_proves_nothing(signed: Signed, allow: bool) -> None:
    other = signed.publish("2.0")
    reference = signed.bench.publish()
    shutil.copytree(_build(signed, other), signed.statements(reference) / "build-copied")
    with pytest.raises(UntrustedError, match="another package"):
        signed.check(reference, allow_unsigned=allow)


def test_manifest_sealed_anew_under_a_signed_version_is_corrupt(signed: Signed) -> None:
    reference = signed.publish()
    folder = signed.bench.registry.location(reference)
    shutil.rmtree(folder)
    folder.mkdir()
    signed.bench.seal(folder, signed.bench.engine(b"evil" * 100))
    package = signed.bench.registry.resolve(str(reference))
    assert package.digest != reference.digest
    for allow in (False, True):
        with pytest.raises(CorruptError, match="not the one that builder signed"):
            signed.check(replace(reference, digest=package.digest), allow_unsigned=allow)


def test_verdict_of_another_package_proves_nothing(signed: Signed) -> None:
    other = signed.publish("2.0")
    reference = signed.bench.publish()
    signed.sign(reference)
    shutil.copytree(signed.statements(other) / "test-1", signed.statements(reference) / "test-1")
    with pytest.raises(UntrustedError, match="another package"):
        signed.check(reference)


def test_report_that_changed_since_it_was_signed_is_corrupt(signed: Signed) -> None:
    reference = signed.publish()
    signed.accept(reference, name="test-2")
    path = signed.statements(reference) / "test-1" / "report.json"
    report = json.loads(path.read_bytes())
    for changed in ({**report, "verdict": "accepted"}, {**report, "card": "NVIDIA-L4"}, 7):
        _rewrite(path, json.dumps(changed).encode())
        with pytest.raises(CorruptError, match="not the report that judge signed"):
            signed.check(reference)
    path.unlink()
    with pytest.raises(CorruptError, match="missing"):
        signed.check(reference)


def test_manifest_signature_is_no_verdict_and_provenance_no_manifest(signed: Signed) -> None:
    reference = signed.publish()
    build = _build(signed, reference)
    both = TrustPolicy(keys=(trusted(signed.builder, "builds", "verdicts"),))
    manifest, provenance = build / "manifest.dsse.json", build / "provenance.dsse.json"
    kept = manifest.read_bytes()
    _rewrite(manifest, provenance.read_bytes())
    with pytest.raises(UntrustedError, match="holds a"):
        signed.check(reference, both)
    _rewrite(manifest, kept)
    _rewrite(signed.statements(reference) / "test-1" / "test-result.dsse.json", kept)
    with pytest.raises(UntrustedError, match="holds a"):
        signed.check(reference, both)


@pytest.mark.parametrize("name", ["manifest.dsse.json", "provenance.dsse.json", "model.sig"])
@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "symlink", "long"])
def test_damaged_signature_is_untrusted(signed: Signed, name: str, how: str) -> None:
    if name == "model.sig" and not available():
        pytest.skip("the extra `sign` is not installed")
    reference = signed.publish()
    (path,) = signed.statements(reference).glob(f"*/{name}")
    data = path.read_bytes()
    if how == "symlink":
        path.rename(path.with_name("aside"))
        path.symlink_to("aside")
    else:
        middle = data.index(b'"payload"') + 30  # inside what is signed
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        damaged = {
            "flip": flipped,
            "truncate": data[:-20],
            "empty": b"",
            "long": data + b" " * (17 << 20),
        }
        _rewrite(path, damaged[how])
    with pytest.raises(UntrustedError):
        signed.check(reference, allow_unsigned=True)


def test_missing_signature_is_untrusted(signed: Signed) -> None:
    reference = signed.publish()
    (_build(signed, reference) / "manifest.dsse.json").unlink()
    with pytest.raises(UntrustedError, match="not signed"):
        signed.check(reference)


def _with_provenance(signed: Signed, change: Any) -> Any:
    """A published package whose provenance was changed before it was signed."""
    reference = signed.bench.publish()
    signed.sign(reference)
    package = signed.bench.registry.resolve(str(reference))
    statement = provenance_statement(package, RUN)
    change(statement["predicate"])
    path = _build(signed, reference) / "provenance.dsse.json"
    payload = statement_bytes(statement)
    _rewrite(path, sign_envelope(payload, STATEMENT_TYPE, signed.builder))
    return reference


def test_provenance_is_compared_with_the_package(signed: Signed) -> None:
    def settings(predicate: Any) -> None:
        predicate["buildDefinition"]["externalParameters"]["config"] = {}

    def kind(predicate: Any) -> None:
        predicate["buildDefinition"]["buildType"] = "https://example.com/other"

    def nothing(predicate: Any) -> None:
        predicate.clear()

    cases = ((settings, "other settings"), (kind, "buildType"), (nothing, "not SLSA"))
    for number, (change, reason) in enumerate(cases):
        signed.bench.registry.path.rename(signed.home.with_name(f"old-{number}")) if number else 0
        reference = _with_provenance(signed, change)
        with pytest.raises(UntrustedError, match=reason):
            signed.check(reference)


def test_policy_that_names_builders_wants_one_of_them(signed: Signed) -> None:
    reference = signed.publish()
    named = signed.policy(builder_ids=(RUN.builder_id,))
    assert signed.check(reference, named).builder_id == RUN.builder_id
    with pytest.raises(UntrustedError, match="is not in the policy"):
        signed.check(reference, signed.policy(builder_ids=("https://ci.example/other",)))
    (_build(signed, reference) / "provenance.dsse.json").unlink()
    with pytest.raises(UntrustedError, match="no provenance"):
        signed.check(reference, named)
    assert signed.check(reference).builder_id is None


def test_package_that_is_not_its_digest_is_not_signed(signed: Signed) -> None:
    reference = signed.bench.publish()
    package = signed.bench.registry.resolve(str(reference))
    forged = replace(package, manifest={**package.manifest, "version": "9.9"})
    with pytest.raises(CorruptError, match="digest"):
        sign_package(forged, signed.builder, RUN)
    assert not signed.statements(reference).exists()


@pytest.mark.parametrize(
    "report",
    [
        b"",
        b"[]",
        b"{}",
        b'{"verdict":"fine","digest":"a"}',
        b'{"verdict":"accepted","card":"L4","digest":"a"}',
    ],
)
def test_what_is_no_report_is_not_signed(report: bytes) -> None:
    with pytest.raises(CorruptError, match="cannot be signed"):
        sign_report(report, generate_key())
