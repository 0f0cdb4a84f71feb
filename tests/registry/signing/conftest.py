"""Signed packages in a folder registry, and policies for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.values import Reference
from pipeline.registry.signing.attestations import BuildRun
from pipeline.registry.signing.command import Request, run_verify
from pipeline.registry.signing.keys import SigningKey, generate_key
from pipeline.registry.signing.signer import build_statements, sign_report
from pipeline.registry.signing.trust import Role, TrustedKey, TrustPolicy
from pipeline.registry.signing.verification import Verification, verify_signatures

RUN = BuildRun(
    builder_id="https://ci.example/build",
    builder_version="0.1",
    invocation_id="run-1",
    started=datetime(2026, 11, 25, 9, 0, tzinfo=UTC),
    finished=datetime(2026, 11, 25, 9, 5, tzinfo=UTC),
)


LIGHT_INSTALL = """\
import sys
for name in ("model_signing", "OpenSSL", "sigstore", "google", "torch", "certifi"):
    sys.modules[name] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "model_signing" else find(name)
from pipeline.cli import app
app()
"""
"""`enginesmith` where the extra `sign` and all that is heavy is missing."""


def trusted(key: SigningKey, *roles: Role, name: str = "ci") -> TrustedKey:
    return TrustedKey(name=name, public_key=key.public.pem.decode(), may_sign=roles)


@dataclass(frozen=True, kw_only=True)
class Signed:
    """A registry, a builder's key and a judge's key."""

    bench: Any
    home: Path
    builder: SigningKey = field(default_factory=generate_key)
    judge: SigningKey = field(default_factory=generate_key)

    def policy(self, **more: Any) -> TrustPolicy:
        keys = (
            trusted(self.builder, "builds", name="builder"),
            trusted(self.judge, "verdicts", name="judge"),
        )
        return TrustPolicy(**{"keys": keys, **more})

    def write_policy(self, **more: Any) -> Path:
        """The same policy as a file."""
        self.home.mkdir(exist_ok=True)
        path = self.home / "policy.json"
        keys: Sequence[dict[str, Any]] = [
            {"name": key.name, "public_key": key.public_key, "may_sign": list(key.may_sign)}
            for key in self.policy().keys
        ]
        path.write_text(json.dumps({"schema": 1, "keys": keys, **more}))
        return path

    def sign(self, reference: Reference, key: SigningKey | None = None) -> Path:
        """Sign what is published already; the folder with the envelopes."""
        package = self.bench.registry.resolve(f"{reference.name}@sha256:{reference.digest}")
        statements = build_statements(package, key or self.builder, RUN)
        for name, files in statements.items():
            self.bench.registry.add_statement(reference, name, files)
        return self.statements(reference) / next(iter(statements))

    def accept(
        self, reference: Reference, key: SigningKey | None = None, name: str = "test-1"
    ) -> Path:
        report = self.bench.report(reference)
        files = {"report.json": report, **sign_report(report, key or self.judge)}
        folder: Path = self.bench.registry.add_statement(reference, name, files)
        return folder

    def publish(self, version: str = "1.0") -> Reference:
        """A signed package with a signed verdict."""
        reference: Reference = self.bench.publish(label=self.bench.label(version))
        self.sign(reference)
        self.accept(reference)
        return reference

    def statements(self, reference: Reference) -> Path:
        folder: Path = self.bench.registry.location(reference)
        return folder.with_name(f"{reference.version}.statements")

    def check(
        self, reference: Reference, policy: TrustPolicy | None = None, **more: Any
    ) -> Verification:
        """The signatures alone."""
        package = self.bench.registry.resolve(f"{reference.name}@sha256:{reference.digest}")
        return verify_signatures(
            package, self.statements(reference), policy or self.policy(), **more
        )

    def verify(self, reference: Reference) -> Verification:
        """All of it, as the command does."""
        request = Request(
            target=str(self.bench.registry.location(reference)),
            registry=str(self.bench.registry.path),
            policy=self.write_policy(),
        )
        return run_verify(request, {"ENGINESMITH_CONFIG": str(self.home)})


@pytest.fixture
def signed(bench: Any, tmp_path: Path) -> Signed:
    return Signed(bench=bench, home=tmp_path / "home")
