"""Which signed verdicts open which channels."""

from __future__ import annotations

import os

import pytest

from pipeline.core.errors import ExitCode, NotAcceptedError, UntrustedError
from pipeline.core.values import Reference, VerdictName
from pipeline.registry.policy import require_enterable
from pipeline.registry.signing.signer import sign_report
from tests.registry.signing.conftest import Signed

CARD = "NVIDIA-GeForce-RTX-4090"


def _signed(signed: Signed, verdict: VerdictName, name: str = "test-1") -> Reference:
    reference: Reference = signed.bench.publish()
    if not signed.statements(reference).exists():
        signed.sign(reference)
    report = signed.bench.report(reference, verdict)
    files = {"report.json": report, **sign_report(report, signed.judge)}
    signed.bench.registry.add_statement(reference, name, files)
    return reference


@pytest.mark.parametrize("verdict", ["accepted", "checked", "compiled"])
def test_passing_verdict_opens_every_channel_but_stable(
    signed: Signed, verdict: VerdictName
) -> None:
    found = signed.check(_signed(signed, verdict))
    for channel in ("candidate", "mine"):
        require_enterable(found, channel, CARD)


def test_only_accepted_opens_stable_and_only_of_its_card(signed: Signed) -> None:
    found = signed.check(_signed(signed, "accepted"))
    require_enterable(found, "stable", CARD)
    with pytest.raises(UntrustedError, match="no signed test result for this card"):
        require_enterable(found, "stable", "NVIDIA-L4")


@pytest.mark.parametrize("verdict", ["checked", "compiled", "rejected"])
def test_less_than_accepted_does_not_open_stable(signed: Signed, verdict: VerdictName) -> None:
    found = signed.check(_signed(signed, verdict))
    with pytest.raises(NotAcceptedError, match=f"verdict is {verdict}.*needs accepted") as raised:
        require_enterable(found, "stable", CARD)
    assert raised.value.exit_code is ExitCode.NOT_ACCEPTED


def test_newest_verdict_decides(signed: Signed) -> None:
    reference = _signed(signed, "accepted", name="test-2")
    os.utime(signed.statements(reference) / "test-2", (1_000, 1_000))
    _signed(signed, "rejected", name="test-1")
    with pytest.raises(NotAcceptedError, match="rejected"):
        require_enterable(signed.check(reference), "candidate", CARD)


def test_what_is_unsigned_enters_nothing(signed: Signed) -> None:
    reference = signed.bench.publish()
    signed.bench.accept(reference, verdict="accepted")
    found = signed.check(reference, allow_unsigned=True)
    with pytest.raises(UntrustedError, match="nobody signed it"):
        require_enterable(found, "candidate", CARD)
    signed.sign(reference)
    found = signed.check(reference, allow_unsigned=True)
    with pytest.raises(UntrustedError, match="no signed test result"):
        require_enterable(found, "candidate", CARD)
