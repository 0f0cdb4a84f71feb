"""Check the signatures of a package, and what was said about it, against a policy.

Statements are append-only and anybody who may write there can add one. So a foreign signature
beside a good one is ignored and reported; it is fatal where no good one is. So is a trusted
signature of other bytes under the same reference: a run that was killed leaves one, and its
successor's stands beside it. A report that changed after it was signed is always fatal.

What this cannot see: that a statement was removed. Whoever may delete there can take away the
newest verdict and leave an older one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.core.errors import CorruptError, UntrustedError
from pipeline.core.values import Package, VerdictName
from pipeline.registry.disk import disk_errors, read_bounded
from pipeline.registry.manifest import digest_bytes
from pipeline.registry.signing.attestations import (
    BUILD_TYPE,
    PROVENANCE,
    TEST_RESULT,
    external_parameters,
    parse_statement,
)
from pipeline.registry.signing.envelope import (
    MANIFEST_TYPE,
    MAX_ENVELOPE_BYTES,
    STATEMENT_TYPE,
    Envelope,
    parse_envelope,
)
from pipeline.registry.signing.model_signature import (
    MAX_SIGNATURE_BYTES,
    MODEL_SIGNATURE,
    available,
    believed_engine_signature,
)
from pipeline.registry.signing.signer import (
    MANIFEST_ENVELOPE,
    PROVENANCE_ENVELOPE,
    TEST_RESULT_ENVELOPE,
)
from pipeline.registry.signing.trust import Role, Signer, TrustPolicy
from pipeline.registry.statements import REPORT, Statement, read_statements

_MAX_REPORT_BYTES = 16 << 20
ModelSignature = Literal["verified", "absent", "not checked"]
_Found = TypeVar("_Found")


@dataclass(frozen=True, kw_only=True)
class SignedVerdict:
    """A test result whose signature and report hold.

    Attributes:
        card: The card that it counts for.
        verdict: Such as `accepted`.
        statement: Name of its folder.
        signer: Who signed it.
    """

    card: str
    verdict: VerdictName
    statement: str
    signer: Signer


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was checked and held.

    Attributes:
        package: Every byte verified.
        signer: Who signed the build; None if it is unsigned, which was explicitly allowed.
        model_signature: `not checked` if the extra `sign` is not installed; the signature over the
            manifest covers the same files.
        builder_id: What ran the build, from signed provenance; None without.
        verdicts: Newest first; unsigned ones are not among them.
        ignored: What was found and does not count, with the reason.
    """

    package: Package
    signer: Signer | None
    model_signature: ModelSignature
    builder_id: str | None
    verdicts: tuple[SignedVerdict, ...] = ()
    ignored: tuple[str, ...] = field(default=())

    def verdict(self, card: str) -> SignedVerdict | None:
        """The newest signed verdict for a card; None if there is none."""
        return next((found for found in self.verdicts if found.card == card), None)


def verify_signatures(
    package: Package, statements_dir: Path, policy: TrustPolicy, *, allow_unsigned: bool = False
) -> Verification:
    """Check everything that was signed about a package.

    Args:
        package: From `pipeline.registry.package.verify`: its bytes are what its manifest says.
        statements_dir: `<version>.statements` beside it; may be missing.
        policy: Whom to believe.
        allow_unsigned: A package without any signature passes, and so do verdicts without any. One
            that is signed by somebody else does not, and nothing that is revoked does.

    Raises:
        UntrustedError: Unsigned, revoked, or signed by nobody who may.
        CorruptError: Changed after it was signed.
    """
    policy.require_not_revoked(package.digest)
    with disk_errors(f"read {statements_dir}"):
        check = _Check(package=package, policy=policy, statements=read_statements(statements_dir))
        signer = check.build_signer(allow_unsigned)
        model_signature = check.model_signature()
        builder_id = check.builder_id()
        verdicts = check.verdicts(allow_unsigned)
    return Verification(
        package=package,
        signer=signer,
        model_signature=model_signature,
        builder_id=builder_id,
        verdicts=verdicts,
        ignored=tuple(check.ignored),
    )


@dataclass(frozen=True, kw_only=True)
class _Check:
    package: Package
    policy: TrustPolicy
    statements: Sequence[Statement]
    ignored: list[str] = field(default_factory=list)

    def build_signer(self, allow_unsigned: bool) -> Signer | None:
        """Who signed the bytes of the manifest."""
        found = self._first(MANIFEST_ENVELOPE, self._manifest_signer)
        if found is None and not allow_unsigned:
            raise UntrustedError(
                f"{self.package.dir} is not signed; get a signed one, or accept it as it is "
                "with --allow-unsigned"
            )
        return found

    def _manifest_signer(self, path: Path) -> Signer:
        envelope, signer = self._open(path, MANIFEST_TYPE, "builds")
        if digest_bytes(envelope.payload) == self.package.digest:
            return signer
        if _reference(envelope.payload) == _reference_of(self.package.manifest):
            raise CorruptError(
                f"{self.package.dir}: manifest.json is not the one that {signer.name} signed; "
                "pull or build the package again"
            )
        raise UntrustedError(f"{path} is the signature of another package; it proves nothing here")

    def model_signature(self) -> ModelSignature:
        """Whether a trusted key made the model signature."""
        if not available():
            there = any(self._files(MODEL_SIGNATURE))
            return "not checked" if there else "absent"
        return self._first(MODEL_SIGNATURE, self._check_model_signature) or "absent"

    def _check_model_signature(self, path: Path) -> ModelSignature:
        data = _read(path, MAX_SIGNATURE_BYTES)
        believed_engine_signature(data, self.package.manifest, self.policy, str(path))
        return "verified"

    def builder_id(self) -> str | None:
        """The builder that signed provenance names."""
        found = self._first(PROVENANCE_ENVELOPE, self._provenance_builder)
        if found is None and self.policy.builder_ids:
            raise UntrustedError(
                f"{self.package.dir} has no provenance, and the policy wants one of "
                f"{', '.join(self.policy.builder_ids)}"
            )
        return found

    def _provenance_builder(self, path: Path) -> str:
        predicate, _ = self._predicate(path, PROVENANCE, "builds")
        try:
            definition = predicate["buildDefinition"]
            build_type, chosen = definition["buildType"], definition["externalParameters"]
            builder_id = str(predicate["runDetails"]["builder"]["id"])
        except (KeyError, TypeError) as error:
            raise UntrustedError(f"{path} is not SLSA provenance: {error!r}") from error
        if build_type != BUILD_TYPE:
            raise UntrustedError(f"{path} has buildType {build_type!r}, wanted {BUILD_TYPE}")
        if chosen != external_parameters(self.package.manifest):
            raise UntrustedError(f"{path} tells of other settings than the manifest")
        if self.policy.builder_ids and builder_id not in self.policy.builder_ids:
            raise UntrustedError(
                f"{path}: builder {builder_id} is not in the policy; "
                f"it has {', '.join(self.policy.builder_ids)}"
            )
        return builder_id

    def verdicts(self, allow_unsigned: bool) -> tuple[SignedVerdict, ...]:
        """All test results that count, newest first."""
        good: list[SignedVerdict] = []
        faults: list[UntrustedError] = []
        unsigned: list[str] = []
        for statement in self.statements:
            path = statement.dir / TEST_RESULT_ENVELOPE
            if not _there(path):
                if _there(statement.dir / REPORT):
                    unsigned.append(f"{statement.name}: its verdict is not signed")
                continue
            try:
                good.append(self._signed_verdict(statement, path))
            except UntrustedError as error:
                faults.append(error)
        if faults and not good:
            raise faults[0]
        if unsigned and not good and not allow_unsigned:
            raise UntrustedError(f"{unsigned[0]}; accept it as it is with --allow-unsigned")
        self.ignored.extend([*map(str, faults), *unsigned])
        return tuple(good)

    def _signed_verdict(self, statement: Statement, path: Path) -> SignedVerdict:
        predicate, signer = self._predicate(path, TEST_RESULT, "verdicts")
        try:
            (report,) = predicate["configuration"]
            wanted = report["digest"]["sha256"]
            card, verdict = predicate["enginesmith_card"], predicate["enginesmith_verdict"]
        except (KeyError, TypeError, ValueError) as error:
            raise UntrustedError(f"{path} is not a test result of ours: {error!r}") from error
        data = read_bounded(statement.dir / REPORT, _MAX_REPORT_BYTES)
        if hashlib.sha256(data).hexdigest() != wanted:
            raise CorruptError(
                f"{statement.dir / REPORT} is not the report that {signer.name} signed"
            )
        if (statement.card, statement.verdict) != (card, verdict):
            raise CorruptError(f"{statement.dir / REPORT} says other than its signature")
        return SignedVerdict(card=card, verdict=verdict, statement=statement.name, signer=signer)

    def _first(self, name: str, check: Callable[[Path], _Found]) -> _Found | None:
        """The first file of this name that holds; None if there is no such file.

        Beside one that holds, others may be of a run that was killed before its package showed.

        Raises:
            UntrustedError: There are some, and none holds.
            CorruptError: The same, and a trusted key signed other bytes.
        """
        good: _Found | None = None
        faults: list[UntrustedError | CorruptError] = []
        for path in self._files(name):
            try:
                found = check(path)
                good = found if good is None else good
            except (UntrustedError, CorruptError) as error:
                faults.append(error)
        if good is None and faults:
            raise next((one for one in faults if isinstance(one, CorruptError)), faults[0])
        self.ignored.extend(map(str, faults))
        return good

    def _files(self, name: str) -> Iterator[Path]:
        return (
            statement.dir / name for statement in self.statements if _there(statement.dir / name)
        )

    def _open(self, path: Path, payload_type: str, role: Role) -> tuple[Envelope, Signer]:
        """A signed file, and who signed it."""
        envelope = parse_envelope(_read(path, MAX_ENVELOPE_BYTES), str(path))
        if envelope.payload_type != payload_type:
            raise UntrustedError(
                f"{path} holds a {envelope.payload_type[:80]!r}, wanted {payload_type}"
            )
        return envelope, self.policy.signer(envelope, role, str(path))

    def _predicate(
        self, path: Path, predicate_type: str, role: Role
    ) -> tuple[dict[str, Any], Signer]:
        envelope, signer = self._open(path, STATEMENT_TYPE, role)
        digest = self.package.digest
        return parse_statement(envelope.payload, predicate_type, digest, str(path)), signer


def _there(path: Path) -> bool:
    """Whether there is anything under this name, a dangling link included."""
    return path.is_symlink() or path.exists()


def _read(path: Path, limit_bytes: int) -> bytes:
    """A signature file; one that is a link or endless proves nothing."""
    try:
        return read_bounded(path, limit_bytes)
    except CorruptError as error:
        raise UntrustedError(str(error)) from error


def _reference(data: bytes) -> tuple[Any, ...]:
    try:
        return _reference_of(json.loads(data))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return ()


def _reference_of(manifest: Any) -> tuple[Any, ...]:
    return tuple(manifest.get(part) for part in ("name", "variant", "version"))
