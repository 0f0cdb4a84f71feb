"""Which package fits which machine; without any store."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.core.errors import (
    CorruptError,
    IncompatibleError,
    PipelineError,
    RecipeError,
    UntrustedError,
)
from pipeline.core.published import Package
from pipeline.registry.client.machine import Facts, Runtime
from pipeline.registry.reference import parse_reference
from pipeline.registry.resolve import Refused
from pipeline.registry.select import Chosen, best
from pipeline.registry.trust.verification import Resolved, SignedVerdict

ADA, L4, H100 = "NVIDIA-GeForce-RTX-4090", "NVIDIA-L4", "NVIDIA-H100-80GB-HBM3"
MACHINE = Facts(
    sm=89,
    card=ADA,
    vram_bytes=24 << 30,
    driver="580.65.06",
    cuda="13.0",
    runtime=Runtime(name="vllm", version="0.29"),
)


def candidate(
    variant: str = "sm89-trtrtx-fp8-b8",
    *,
    verdicts: dict[str, str] | None = None,
    pointed: tuple[str, ...] = (),
    digest: str = "",
    batch: int = 8,
    **match: Any,
) -> Resolved:
    manifest: dict[str, Any] = {
        "name": "phi3",
        "recipe_version": "1",
        "build_key": "b" * 64,
        "variant": variant,
        "match": {
            "sm": [89],
            "cards": [],
            "min_vram_bytes": 1 << 30,
            "runtime": {"name": "vllm", "version": "0.29.0"},
            "cuda": None,
            "driver_min": None,
            **match,
        },
        "limits": {"max_batch_size": batch, "max_seq_len": 1024},
    }
    package = Package(dir=Path(variant), manifest=manifest, digest=digest or variant)
    signed = tuple(
        SignedVerdict(
            card=card,
            runtime=(manifest["match"]["runtime"]["name"], manifest["match"]["runtime"]["version"]),
            verdict=cast(Any, verdict),
            signed_at="",
            statement="s",
            signer=cast(Any, None),
        )
        for card, verdict in (verdicts if verdicts is not None else {ADA: "accepted"}).items()
    )
    return Resolved(package=package, verdicts=signed, channel="stable", cards=pointed)


def choose(
    *found: Resolved, facts: Facts = MACHINE, refused: tuple[Refused, ...] = (), **rules: Any
) -> Chosen:
    return best(found, refused, parse_reference("phi3"), facts, **rules)


def facts(**changes: Any) -> Facts:
    return Facts(**{**vars(MACHINE), **changes})


@pytest.mark.parametrize(
    ("match", "reason"),
    [
        ({"sm": [90]}, "compiled for SM 90, this machine has SM 89"),
        ({"cards": [L4]}, f"tuned for {L4}, this machine has {ADA}"),
        ({"min_vram_bytes": (24 << 30) + 1}, "needs 24.0 GiB"),
        ({"driver_min": "580.65.07"}, "driver 580.65.07 or newer"),
        ({"cuda": "13.1"}, "cuda 13.1 or newer"),
        ({"runtime": {"name": "sglang", "version": "0.29.0"}}, "needs sglang"),
        ({"runtime": {"name": "vllm", "version": "0.29.1"}}, "needs vllm 0.29.1"),
    ],
)
def test_each_mismatch_rejects_with_its_reason(match: dict[str, Any], reason: str) -> None:
    with pytest.raises(IncompatibleError, match=reason.replace(".", r"\.")):
        choose(candidate(**match))


@pytest.mark.parametrize(
    ("match", "known"),
    [
        ({"sm": []}, {"sm": 90, "card": ADA}),
        ({"cards": [L4, ADA]}, {}),
        ({"min_vram_bytes": 24 << 30}, {}),
        ({"driver_min": "580.9"}, {}),
        ({"cuda": "13.0"}, {}),
        ({"runtime": {"name": "vLLM", "version": "0.29"}}, {}),
        (
            {"runtime": {"name": "tensorrt_llm", "version": "1.2.1rc5"}},
            {"runtime": Runtime(name="tensorrt-llm", version="1.2.1rc5")},
        ),
    ],
)
def test_what_fits_to_the_edge_fits(match: dict[str, Any], known: dict[str, Any]) -> None:
    assert choose(candidate(**match), facts=facts(**known)).unknown == ()


@pytest.mark.parametrize(
    ("match", "fact", "reported"),
    [
        ({"cuda": "13.0"}, "cuda", "the cuda"),
        ({}, "vram_bytes", "the device memory"),
        ({}, "runtime", "the runtime: it needs vllm 0.29.0"),
        ({}, "runtime of any version", "the runtime: it needs vllm 0.29.0"),
    ],
)
def test_an_unknown_fact_is_reported_and_rejects_nothing(
    match: dict[str, Any], fact: str, reported: str
) -> None:
    known = {"runtime": Runtime(name="vllm")} if " " in fact else {fact: None}
    (unknown,) = choose(candidate(**match), facts=facts(**known)).unknown
    assert unknown.startswith(reported)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (candidate("any", sm=[]), candidate("sm89-x", verdicts={ADA: "checked"})),
        (candidate("z", verdicts={ADA: "checked"}), candidate("a", verdicts={ADA: "compiled"})),
        (candidate("z"), candidate("a", sm=[])),
        (candidate("z", cards=[ADA]), candidate("a")),
        (candidate("z", batch=64), candidate("a", batch=8)),
    ],
    ids=["proof", "weaker proof", "portable last", "tuned first", "room"],
)
def test_the_better_of_two_is_taken_and_the_other_one_named(
    better: Resolved, worse: Resolved
) -> None:
    for pair in ((better, worse), (worse, better)):
        chosen = choose(*pair, accept_unproven=True)
        assert chosen.resolved is better
        assert chosen.rejected == (f"{worse.place}: it fits, {better.place} is preferred",)


def test_nothing_fits_names_every_reason_with_the_nearest_miss_first() -> None:
    far = candidate("far", sm=[100], min_vram_bytes=80 << 30, verdicts={})
    near = candidate("near", min_vram_bytes=25 << 30)
    with pytest.raises(IncompatibleError) as caught:
        choose(far, near)
    text = str(caught.value)
    assert text.index("phi3/near") < text.index("phi3/far")
    assert "SM 100" in text
    assert "25.0 GiB" in text
    assert "--accept-unproven" not in text  # would not help the nearest one


@pytest.mark.parametrize(
    ("verdicts", "kind"),
    [
        ({ADA: "accepted"}, "proven"),
        ({ADA: "checked"}, "unproven"),
        ({L4: "accepted"}, "unproven"),
        ({ADA: "rejected", L4: "accepted"}, "unproven"),
        ({}, "unproven"),
    ],
)
def test_only_accepted_on_this_very_card_proves(verdicts: dict[str, str], kind: str) -> None:
    chosen = choose(candidate(verdicts=verdicts), accept_unproven=True)
    assert chosen.proof.kind == kind
    if kind == "unproven":
        checked = verdicts.get(ADA) == "checked"
        how = f"checked on another device, never run on {ADA}" if checked else ""
        with pytest.raises(IncompatibleError, match=f"{how}.*--accept-unproven"):
            choose(candidate(verdicts=verdicts))


def test_without_a_card_a_proof_on_some_card_is_reported_and_none_is_refused() -> None:
    blind = facts(card=None)
    chosen = choose(candidate(verdicts={L4: "accepted"}), facts=blind)
    assert chosen.proof.kind == "unknown"
    assert L4 in chosen.unknown[0]
    with pytest.raises(IncompatibleError, match="--accept-unproven"):
        choose(candidate(verdicts={L4: "checked"}), facts=blind)


def test_where_nothing_is_known_of_the_gpu_variants_are_not_guessed() -> None:
    nothing = facts(sm=None, card=None, vram_bytes=None)
    assert choose(candidate("a"), facts=nothing).proof.kind == "unknown"
    with pytest.raises(RecipeError, match=r"phi3/a:1.*, phi3/b:1"):
        choose(candidate("a"), candidate("b"), facts=nothing)


def test_one_channel_that_means_two_packages_for_unknown_cards_is_not_guessed() -> None:
    blind = facts(card=None)
    first = candidate("a", digest="1" * 64, pointed=(ADA,))
    second = candidate("a", digest="2" * 64, pointed=(L4,))
    with pytest.raises(RecipeError, match=f"{ADA}.*{L4}"):
        choose(first, second, facts=blind)
    with pytest.raises(IncompatibleError, match="points to it for NVIDIA-L4 only"):
        choose(candidate(pointed=(L4,)))


@pytest.mark.parametrize("error", [UntrustedError("no signature"), CorruptError("bit flip")])
def test_what_cannot_be_trusted_is_rejected_and_alone_it_is_the_error(
    error: PipelineError,
) -> None:
    bad = ("phi3/bad:1", error)
    assert choose(candidate(), refused=(bad,)).rejected == (f"phi3/bad:1: {error}",)
    with pytest.raises(type(error), match=str(error)):
        choose(refused=(bad,))
    with pytest.raises(type(error)):
        choose(refused=(bad, bad))
    with pytest.raises(IncompatibleError, match=str(error)):
        choose(candidate(sm=[90]), refused=(bad,))
