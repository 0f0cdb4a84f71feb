"""What is believed of a machine: flags, NVML, and nothing else."""

from __future__ import annotations

import sys

import pytest

from pipeline.core.errors import IncompatibleError, RecipeError
from pipeline.registry.client.machine import (
    Flags,
    facts_of,
)
from tests.nvml import Card, nvml

ADA = "NVIDIA-GeForce-RTX-4090"


def test_auto_asks_nvml_and_takes_the_card_with_the_most_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(Card(free=1), Card(free=9 << 30)))
    facts = facts_of(Flags(), {})
    assert (facts.sm, facts.card, facts.vram_bytes) == (89, ADA, 9 << 30)
    assert (facts.driver, facts.cuda, facts.runtime) == ("580.65.06", "13.0", None)
    assert set(facts.origins.values()) == {"probed"}


@pytest.mark.parametrize(
    ("visible", "free"), [("0", 1), ("1,0", 9), ("GPU-1", 9), ("0,-1,1", 1), ("0, 1", 9)]
)
def test_auto_looks_only_at_the_cards_that_cuda_sees(
    monkeypatch: pytest.MonkeyPatch, visible: str, free: int
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(Card(free=1), Card(free=9)))
    assert facts_of(Flags(), {"CUDA_VISIBLE_DEVICES": visible}).vram_bytes == free


@pytest.mark.parametrize("visible", ["", "-1", "7"])
def test_auto_without_a_visible_card_says_which_flag_helps(
    monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(Card()))
    with pytest.raises(IncompatibleError, match="--gpu rtx4090"):
        facts_of(Flags(), {"CUDA_VISIBLE_DEVICES": visible})


def test_auto_without_nvml_or_driver_says_which_flag_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(fault="Driver Not Loaded"))
    with pytest.raises(IncompatibleError, match=r"Driver Not Loaded.*--gpu none"):
        facts_of(Flags(), {})
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(IncompatibleError, match="pip install nvidia-ml-py"):
        facts_of(Flags(), {})


def test_auto_does_not_choose_between_kinds_of_cards_nor_take_a_part_for_a_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(Card(), Card(name="NVIDIA L4")))
    with pytest.raises(RecipeError, match=f"{ADA}, NVIDIA-L4"):
        facts_of(Flags(), {})
    part = Card(name="NVIDIA H100 80GB HBM3", mig=True)
    monkeypatch.setitem(sys.modules, "pynvml", nvml(part))
    with pytest.raises(IncompatibleError, match="MIG"):
        facts_of(Flags(), {})


def test_flags_come_before_what_nvml_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(Card()))
    facts = facts_of(Flags(vram="8.5 GB", driver="999.1", runtime="TensorRT_LLM==1.2.1rc5"), {})
    assert (facts.vram_bytes, facts.driver) == (8_500_000_000, "999.1")
    assert str(facts.runtime) == "tensorrt-llm==1.2.1rc5"
    assert facts.origins["vram_bytes"] == "given"
    assert facts.origins["card"] == "probed"


@pytest.mark.parametrize(
    "gpu", ["rtx4090", ADA, "NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"]
)
def test_a_known_card_brings_what_is_known_of_it(gpu: str) -> None:
    facts = facts_of(Flags(gpu=gpu), {})
    assert (facts.card, facts.sm) == (ADA, 89)
    assert facts.origins["card"] == "given"
    assert facts.origins["sm"] == "known of the card"
    assert facts.vram_bytes is not None
    assert 23 << 30 < facts.vram_bytes < 24 << 30
    assert facts.driver is None


def test_a_card_that_nobody_knows_is_believed_and_its_sm_stays_unknown() -> None:
    facts = facts_of(Flags(gpu="NVIDIA-GeForce-RTX-9990"), {})
    assert (facts.card, facts.sm, facts.vram_bytes) == ("NVIDIA-GeForce-RTX-9990", None, None)


def test_sm_alone_and_none_leave_the_rest_unknown() -> None:
    assert facts_of(Flags(gpu="sm89"), {}).to_json() == {
        "sm": {"value": 89, "origin": "given"},
        **dict.fromkeys(["card", "vram_bytes", "driver", "cuda", "runtime"]),
    }
    assert set(facts_of(Flags(gpu="none"), {}).to_json().values()) == {None}


@pytest.mark.parametrize(
    "flags",
    [
        Flags(gpu="rtx409"),
        Flags(gpu="sm8"),
        Flags(gpu="none", vram="24 potatoes"),
        Flags(gpu="none", vram="-1GiB"),
        Flags(gpu="none", runtime="vllm=0.29"),
        Flags(gpu="none", runtime="vllm=="),
        Flags(gpu="none", driver="new"),
    ],
)
def test_a_flag_that_cannot_be_read_is_a_usage_fault(flags: Flags) -> None:
    with pytest.raises(RecipeError):
        facts_of(flags, {})
