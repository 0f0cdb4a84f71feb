"""Which package is the best for a machine, and why each other one is not; pure.

    judged = [judge(candidate, facts, rules) for candidate in candidates]
    chosen = best(judged, refused, wanted)

A fact that is unknown rejects nothing: it is reported with the choice. A package is proven on a
card by the newest signed verdict that names this card, if it passed; a verdict on another card
counts for nothing.

Among those that fit, the first of these differences decides: proven before unproven, and
`accepted` before `checked` before `compiled`; fewer unknown facts; tuned for the card before
portable within its SM before portable; an ahead-of-time engine before a checkpoint; room for more
tokens (batch x sequence).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import (
    CorruptError,
    Fault,
    IncompatibleError,
    NotFoundError,
    PipelineError,
    RecipeError,
    UntrustedError,
)
from pipeline.core.hardware import GIB
from pipeline.core.values import PASSING, Format, Package
from pipeline.registry.client.machine import Facts, version_key
from pipeline.registry.client.resolve import Offer
from pipeline.registry.lifecycle.records import Yank
from pipeline.registry.reference import ParsedReference
from pipeline.registry.signing.verification import Verification

_PROOFS = ("accepted", "checked", "compiled")
_FORMATS: tuple[Format, ...] = ("trtllm", "trtrtx", "checkpoint")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A version whose manifest and signatures were verified; its files were not fetched.

    Attributes:
        offer: How it was found.
        package: Manifest and digest; its folder is its place in the store, for messages.
        data: The bytes of the manifest.
        verification: Who signed it, and the signed verdicts.
        statements_dir: The statements, as they lie in the store.
        yank: That of a package which is taken all the same, as was explicitly allowed.
    """

    offer: Offer
    package: Package
    data: bytes
    verification: Verification
    statements_dir: Path
    yank: Yank | None = None

    @property
    def what(self) -> str:
        """`name/variant:version`."""
        return str(self.offer.place)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What else the user wants.

    Attributes:
        format: Only this one; None for any.
        accept_unproven: Take a package without a passing verdict on this card.
        sm_of_card: Known cards and their SM, to tell which verdicts may be about an unknown card.
    """

    format: Format | None = None
    accept_unproven: bool = False
    sm_of_card: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Whether the package was tried on this card.

    Attributes:
        kind: `unknown` if nobody said which card it is.
        verdict: The passing one.
        cards: All cards with a passing verdict.
        why: What is missing; empty if it is proven.
    """

    kind: Literal["proven", "unproven", "unknown"]
    verdict: str | None = None
    cards: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A candidate, held against a machine.

    Attributes:
        candidate: The package.
        reasons: Why it is rejected; empty if it fits.
        unknown: What nobody knows and would have to be so.
        proof: Whether it was tried on this card.
    """

    candidate: Candidate
    reasons: tuple[str, ...]
    unknown: tuple[str, ...]
    proof: Proof


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A version that was not even looked at: damaged, or not trusted."""

    what: str
    error: PipelineError


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The choice.

    Attributes:
        judged: The package that is taken.
        rejected: Every other one with the reason, `name/variant:version: reason`.
    """

    judged: Judged
    rejected: tuple[str, ...]


def judge(candidate: Candidate, facts: Facts, rules: Rules) -> Judged:
    """Hold a package against a machine."""
    checks = list(_checks(candidate.package.manifest, facts, rules))
    proof = prove(candidate, facts, rules)
    reasons = [text for kind, text in checks if kind == "misfit"]
    if proof.kind == "unproven" and not rules.accept_unproven:
        reasons.append(proof.why)
    unknown = [text for kind, text in checks if kind == "unknown"]
    if proof.kind == "unknown":
        unknown.append(proof.why)
    return Judged(candidate=candidate, reasons=tuple(reasons), unknown=tuple(unknown), proof=proof)


_Check = tuple[Literal["misfit", "unknown"], str]


def _checks(manifest: Mapping[str, Any], facts: Facts, rules: Rules) -> Iterator[_Check]:
    match = manifest["match"]
    if rules.format not in {None, manifest["format"]}:
        yield "misfit", f"its format is {manifest['format']}, wanted {rules.format}"
    if sms := match["sm"]:
        needs = "it is compiled for " + " or ".join(f"SM {sm}" for sm in sms)
        if facts.sm is None:
            yield "unknown", f"the SM: {needs}"
        elif facts.sm not in sms:
            yield "misfit", f"{needs}, this machine has SM {facts.sm}"
    if cards := match["cards"]:
        needs = f"it is tuned for {', '.join(cards)}"
        if facts.card is None:
            yield "unknown", f"the card: {needs}"
        elif facts.card not in cards:
            yield "misfit", f"{needs}, this machine has {facts.card}"
    if needed := match["min_vram_bytes"]:
        needs = f"it needs {needed / GIB:.1f} GiB of device memory"
        if facts.vram_bytes is None:
            yield "unknown", f"the device memory: {needs}"
        elif facts.vram_bytes < needed:
            yield "misfit", f"{needs}, there are {facts.vram_bytes / GIB:.1f} GiB"
    yield from _runtime(match["runtime"], facts)
    for fact, least in (("driver", match["driver_min"]), ("cuda", match["cuda"])):
        yield from _at_least(fact, least, facts.driver if fact == "driver" else facts.cuda)


def _runtime(needed: Mapping[str, str], facts: Facts) -> Iterator[_Check]:
    """An engine needs its runtime in exactly one version."""
    name, version = needed["name"].lower().replace("_", "-"), needed["version"]
    needs = f"it needs {name} {version}"
    if facts.runtime is None or (facts.runtime.name == name and not facts.runtime.version):
        yield "unknown", f"the runtime: {needs}"
    elif facts.runtime.name != name or not _same_version(facts.runtime.version, version):
        yield "misfit", f"{needs}, the runtime is {facts.runtime}"


def _same_version(left: str, right: str) -> bool:
    key = version_key(left)
    return left == right or (key is not None and key == version_key(right))


def _at_least(fact: str, least: str | None, found: str | None) -> Iterator[_Check]:
    if least is None:
        return
    needs = f"it needs {fact} {least} or newer"
    if found is None:
        yield "unknown", f"the {fact}: {needs}"
        return
    has, wants = version_key(found), version_key(least)
    if has is None or wants is None or has < wants:
        yield "misfit", f"{needs}, this machine has {found}"


def prove(candidate: Candidate, facts: Facts, rules: Rules) -> Proof:
    """Whether a signed verdict says that the package passed on this card."""
    verdicts = candidate.verification.verdicts  # newest first
    newest = {one.card: one.verdict for one in reversed(verdicts)}
    passing = tuple(sorted(card for card, verdict in newest.items() if verdict in PASSING))
    elsewhere = f"there is one for {', '.join(passing)}" if passing else "there is one for no card"
    if facts.card is not None:
        verdict = newest.get(facts.card)
        pointed = candidate.offer.cards
        if verdict not in PASSING:
            why = f"no passing signed test result for {facts.card}; {elsewhere}"
            if verdict is not None:
                why += f" (its newest on this card is {verdict})"
            return Proof(kind="unproven", cards=passing, why=why)
        if pointed and facts.card not in pointed:
            why = f"{candidate.offer.channel} points to it for {', '.join(pointed)} only"
            return Proof(kind="unproven", cards=passing, why=why)
        return Proof(kind="proven", verdict=verdict, cards=passing)
    about = [card for card in passing if rules.sm_of_card.get(card) in {facts.sm, None}]
    if facts.sm is None:
        about = list(passing)
    if not about:
        whom = "any card" if facts.sm is None else f"a card of SM {facts.sm}"
        why = f"no passing signed test result for {whom}; {elsewhere}"
        return Proof(kind="unproven", cards=passing, why=why)
    why = f"the card: it has passing signed test results for {', '.join(passing)} alone"
    best_verdict = min((newest[card] for card in about), key=_PROOFS.index)
    return Proof(kind="unknown", verdict=best_verdict, cards=passing, why=why)


def best(
    judged: Sequence[Judged], refused: Sequence[Refused], wanted: ParsedReference, facts: Facts
) -> Chosen:
    """The package to take.

    Args:
        judged: Every version that the reference may mean and that can be believed.
        refused: Those that cannot.
        wanted: The reference.
        facts: Of the machine that they were judged for.

    Raises:
        IncompatibleError: None fits; gives the reason for each, the nearest miss first.
        UntrustedError: None can be believed.
        CorruptError: All are damaged.
        RecipeError: What is known of the machine does not tell two versions apart.
    """
    fitting = sorted((one for one in judged if not one.reasons), key=_rank)
    if not fitting:
        raise _none(judged, refused, wanted)
    first = fitting[0]
    _require_one(first, fitting[1:], wanted, blind=facts.card is None and facts.sm is None)
    rejected = [f"{one.candidate.what}: {'; '.join(one.reasons)}" for one in judged if one.reasons]
    rejected += [
        f"{one.candidate.what}: it fits, {first.candidate.what} is preferred" for one in fitting[1:]
    ]
    rejected += [f"{one.what}: {one.error}" for one in refused]
    return Chosen(judged=first, rejected=tuple(rejected))


def _rank(judged: Judged) -> tuple[Any, ...]:
    manifest = judged.candidate.package.manifest
    match, limits = manifest["match"], manifest["limits"]
    proof = _PROOFS.index(judged.proof.verdict) if judged.proof.verdict else len(_PROOFS)
    return (
        proof,
        len(judged.unknown),
        0 if match["cards"] else 1 if match["sm"] else 2,
        _FORMATS.index(manifest["format"]),
        -limits["max_batch_size"] * limits["max_seq_len"],
        manifest["variant"],
    )


def _require_one(
    first: Judged, rest: Sequence[Judged], wanted: ParsedReference, *, blind: bool
) -> None:
    """Refuse to guess: two of one variant, or several where nothing is known of the GPU."""
    variant = first.candidate.offer.place.variant
    rivals = [
        one
        for one in rest
        if one.candidate.package.digest != first.candidate.package.digest
        and (blind or (one.candidate.offer.place.variant, _rank(one)) == (variant, _rank(first)))
    ]
    if not rivals:
        return
    choices = ", ".join(_shown(one) for one in (first, *rivals))
    advice = "name one of them" if not blind else "name one of them, or the card with --gpu"
    raise RecipeError([Fault("", f"{wanted} may mean {choices}; {advice}")])


def _shown(judged: Judged) -> str:
    cards = judged.candidate.offer.cards
    return f"{judged.candidate.what} ({', '.join(cards)})" if cards else judged.candidate.what


def _none(
    judged: Sequence[Judged], refused: Sequence[Refused], wanted: ParsedReference
) -> PipelineError:
    """The error when nothing can be taken: that of the one version, or all reasons together."""
    if len(judged) + len(refused) == 1 and refused:
        return refused[0].error
    near = sorted(judged, key=lambda one: (len(one.reasons), _rank(one)))
    lines = [f"{one.candidate.what}: {'; '.join(one.reasons)}" for one in near]
    lines += [f"{one.what}: {one.error}" for one in refused]
    if judged:
        unproven = all(one.reasons == (one.proof.why,) for one in near[:1])
        advice = (
            "; to take it nevertheless: --accept-unproven"
            if unproven
            else "; `enginesmith list` shows what there is"
        )
        if len(lines) == 1:
            return IncompatibleError(f"{lines[0]}{advice}")
        listed = "\n  ".join(lines)
        return IncompatibleError(
            f"nothing of {wanted} fits this machine, the nearest miss first{advice}\n  {listed}"
        )
    kinds: tuple[type[PipelineError], ...] = (UntrustedError, CorruptError, NotFoundError)
    kind = next(one for one in kinds if any(isinstance(each.error, one) for each in refused))
    listed = "\n  ".join(lines)
    return kind(f"nothing of {wanted} can be taken\n  {listed}")
