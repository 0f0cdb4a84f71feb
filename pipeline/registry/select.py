"""Which package is the best for a machine, and why each other one is not; pure.

    found, refused = candidates(store, wanted, terms)
    chosen = best(found, refused, wanted, facts)

A package is proven on a card if `accepted` is the newest verdict of its own runtime that ran on
this card. A verdict from elsewhere, or of an engine that was only checked, proves nothing here and
needs `--accept-unproven`. A fact that is unknown rejects nothing: it is reported with the choice.

Among those that fit, the first of these differences decides: proven before unproven, and a verdict
for the card before none; fewer unknown facts; tuned for the card before portable within its SM
before portable; room for more tokens (batch x sequence).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from pipeline.registry.client.machine import Facts, Runtime, version_key
from pipeline.registry.resolve import Refused
from pipeline.registry.trust.verification import NOT_RUN, Resolved

_PROOFS = ("accepted", "checked", "compiled")


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Whether the package ran on this card and passed; unknown if the card is, and some card did.

    `verdict` says most about this card: `accepted` if it is proven; `cards` are all that it is
    proven on; `why` says what is missing, empty if it is proven.
    """

    kind: Literal["proven", "unproven", "unknown"]
    verdict: str | None = None
    cards: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A package, compared with a machine.

    `unknown` is what is not known of the machine and would have to be so; `reasons` are why it
    cannot be taken; `rejected` has every other one with the reason, `name/variant:version: reason`.
    """

    resolved: Resolved
    proof: Proof
    unknown: tuple[str, ...]
    reasons: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()

    @property
    def rank(self) -> tuple[Any, ...]:
        manifest = self.resolved.package.manifest
        match, limits = manifest["match"], manifest["limits"]
        verdict = self.proof.verdict
        return (
            self.proof.kind == "unproven",
            _PROOFS.index(verdict) if verdict in _PROOFS else len(_PROOFS),
            len(self.unknown),
            0 if match["cards"] else 1 if match["sm"] else 2,
            -limits["max_batch_size"] * limits["max_seq_len"],
            manifest["variant"],
        )

    def __str__(self) -> str:
        return f"{self.resolved.place}: {'; '.join(self.reasons)}"


def best(
    found: Sequence[Resolved],
    refused: Sequence[Refused],
    wanted: object,
    facts: Facts,
    *,
    accept_unproven: bool = False,
) -> Chosen:
    """The package to take; `wanted` is what messages say was asked for.

    IncompatibleError if none fits or is proven: gives the reason for each, the nearest first;
    RecipeError if what is known of the machine does not tell two versions apart.
    """
    fits = [_fit(one, facts, accept_unproven) for one in found]
    fitting = sorted((one for one in fits if not one.reasons), key=lambda one: one.rank)
    if not fitting:
        raise _none(fits, refused, wanted)
    first, *rest = fitting
    # Never guessed: two of one variant, or several where nothing is known of the GPU.
    blind = facts.card is None and facts.sm is None
    rivals = [
        one
        for one in rest
        if one.resolved.package.digest != first.resolved.package.digest
        and (blind or one.rank == first.rank)
    ]
    if rivals:
        choices = ", ".join(str(one.resolved) for one in (first, *rivals))
        advice = "specify one, or the card with --gpu" if blind else "specify one"
        raise RecipeError([Fault("", f"{wanted} is ambiguous: {choices}; {advice}")])
    place = first.resolved.place
    rejected = [str(one) for one in fits if one.reasons]
    rejected += [f"{one.resolved.place}: it fits, {place} is preferred" for one in rest]
    rejected += [f"{what}: {error}" for what, error in refused]
    return replace(first, rejected=tuple(rejected))


def prove(found: Resolved, facts: Facts) -> Proof:
    """Whether trusted verdicts say that the package ran on this card and passed."""
    cards, card = found.proven_cards, facts.card
    elsewhere = f"it is proven on {', '.join(cards) or 'no card'}"
    if card is None:
        if not cards:
            return Proof(kind="unproven", why="no card is known to have run it and passed")
        return Proof(kind="unknown", verdict="accepted", cards=cards, why=f"the card: {elsewhere}")
    verdict, proven = found.standing(card), found.proof(card) is not None
    if proven and (not found.cards or card in found.cards):
        return Proof(kind="proven", verdict="accepted", cards=cards)
    shown = verdict.verdict if verdict and (proven or verdict.verdict in NOT_RUN) else None
    if proven:
        why = f"{found.channel} points to it for {', '.join(found.cards)} only"
    elif verdict is None:
        why = f"never run on {card} with a trusted result; {elsewhere}"
    elif shown:
        how = "checked on another device" if shown == "checked" else shown
        why = f"{how}, never run on {card}; {elsewhere}"
    else:
        result = f"{verdict.verdict}, with {' '.join(verdict.runtime)}"
        why = f"its newest trusted verdict on {card} is {result}; {elsewhere}"
    return Proof(kind="unproven", verdict=shown, cards=cards, why=why)


def _fit(found: Resolved, facts: Facts, accept_unproven: bool) -> Chosen:
    manifest, proof = found.package.manifest, prove(found, facts)
    reasons, unknown = [], []
    for fact, needs, fits, here in _checks(manifest["match"], facts):
        if fits is None:
            unknown.append(f"the {fact}: {needs}")
        elif not fits:
            reasons.append(f"{needs}, {here}")
    if proof.kind == "unproven" and not accept_unproven:
        reasons.append(proof.why)
    if proof.kind == "unknown":
        unknown.append(proof.why)
    return Chosen(resolved=found, proof=proof, reasons=tuple(reasons), unknown=tuple(unknown))


def _checks(
    match: Mapping[str, Any], facts: Facts
) -> Iterator[tuple[str, str, bool | None, object]]:
    """Fact, what is needed of it, whether it is so (None: not known), and what there is."""
    if sms := match["sm"]:
        needs = "it is compiled for " + " or ".join(f"SM {sm}" for sm in sms)
        fits = None if facts.sm is None else facts.sm in sms
        yield "SM", needs, fits, f"this machine has SM {facts.sm}"
    if cards := match["cards"]:
        fits = None if facts.card is None else facts.card in cards
        needs = f"it is tuned for {', '.join(cards)}"
        yield "card", needs, fits, f"this machine has {facts.card}"
    if needed := match["min_vram_bytes"]:
        fits = None if facts.vram_bytes is None else facts.vram_bytes >= needed
        needs = f"it needs {needed / GIB:.1f} GiB of device memory"
        there = f"there are {(facts.vram_bytes or 0) / GIB:.1f} GiB"
        yield "device memory", needs, fits, there
    name, version = match["runtime"]["name"].lower().replace("_", "-"), match["runtime"]["version"]
    fits = _runs(facts.runtime, name, version)
    yield "runtime", f"it needs {name} {version}", fits, f"it is {facts.runtime}"
    for fact, least, found in (
        ("driver", match["driver_min"], facts.driver),
        ("cuda", match["cuda"], facts.cuda),
    ):
        if least is not None:
            has, wants = found and version_key(found), version_key(least)
            fits = None if found is None else bool(has and wants and has >= wants)
            yield fact, f"it needs {fact} {least} or newer", fits, f"this machine has {found}"


def _runs(runtime: Runtime | None, name: str, version: str) -> bool | None:
    """An engine needs its runtime in exactly one version; None if that is not known."""
    if runtime is None or (runtime.name == name and not runtime.version):
        return None
    key = version_key(version)
    same = runtime.version == version or (key is not None and key == version_key(runtime.version))
    return runtime.name == name and same


def _none(fits: Sequence[Chosen], refused: Sequence[Refused], wanted: object) -> PipelineError:
    """The error when nothing can be taken: that of the one version, or all reasons together."""
    if not fits and len(refused) == 1:
        return refused[0][1]
    near = sorted(fits, key=lambda one: (len(one.reasons), one.rank))
    lines = [*map(str, near), *(f"{what}: {error}" for what, error in refused)]
    listed = "\n  ".join(lines)
    if not fits:
        kinds: tuple[type[PipelineError], ...] = (UntrustedError, CorruptError, NotFoundError)
        kind = next(one for one in kinds if any(isinstance(error, one) for _, error in refused))
        return kind(f"nothing of {wanted} can be taken\n  {listed}")
    advice = "`enginesmith list` shows what there is"
    if near[0].reasons == (near[0].proof.why,):
        advice = "to take it nevertheless: --accept-unproven"
    if len(lines) == 1:
        return IncompatibleError(f"{lines[0]}; {advice}")
    return IncompatibleError(
        f"nothing of {wanted} fits this machine, the nearest first; {advice}\n  {listed}"
    )
