"""The sustained run itself, on real sessions: what is repeated, counted, and cleared."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from pipeline.acceptance.report import render_page
from pipeline.acceptance.sustained import (
    Sample,
    SustainedLimits,
    judge_sustained,
    run_sustained,
    sustained_json,
)
from pipeline.core.errors import PipelineError, RecipeError
from pipeline.model.hf import load_model
from pipeline.runners.onnxruntime import graph_session
from pipeline.runners.session import BatchOptions, CacheClearing, Generation
from pipeline.runners.transformers import TransformersSession
from pipeline.runners.workload import Lengths, Workload
from tests.acceptance.report_pages import Page, on_card
from tests.formats.decoder.decoders import open_graph, write_graph
from tests.tiny import VOCAB_SIZE, tiny_model

LIMITS = SustainedLimits(
    max_throughput_drop=0.05, max_memory_growth_bytes=20 * 2**20, warm_up_s=10.0, window_s=20.0,
    min_duration_s=40.0,
)  # fmt: skip


class Watched(TransformersSession):
    """A real session that notes what it does, in order."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.done: list[str] = []

    def generate(self, prompts: Any, osl: int, options: BatchOptions | None = None) -> Generation:
        self.done.append(f"generate {len(prompts)}")
        return super().generate(prompts, osl, options)

    def clear_cache(self) -> None:
        self.done.append("clear")
        super().clear_cache()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def session(model_dir: Path) -> Watched:
    return Watched(load_model(model_dir, "float32"))


def run(session: Any, **changes: Any) -> list[Sample]:
    """A run whose clock goes on by a second each time that it is read."""
    load = Workload(name="b2", batch=2, isl=8, osl=6, requests=4, osl_distribution=Lengths(min=2))
    seconds = itertools.count()
    (wave, *_) = load.waves(load.request_prompts(VOCAB_SIZE, 0), 0)
    return run_sustained(session, load.osl, wave, 0.1, clock=lambda: next(seconds), **changes)


def test_first_wave_is_repeated_and_only_real_tokens_count(session: Watched) -> None:
    load = Workload(name="b2", batch=2, isl=8, osl=6, requests=4, osl_distribution=Lengths(min=2))
    samples = run(session)
    made = sum(load.output_lengths(0)[:2])
    assert made < 12
    # Read at the start and at the end of each batch: one second each.
    assert [sample.output_tokens_per_s for sample in samples] == [float(made)] * 3
    assert session.done == ["generate 2"] * 4  # one before the clock starts


def test_cache_is_cleared_after_each_batch_only_where_asked(session: Watched) -> None:
    assert isinstance(session, CacheClearing)
    samples = run(session, clear=True)
    assert len(samples) == 3
    assert session.done == ["generate 2", *["generate 2", "clear"] * 3]


def test_session_without_a_cache_to_clear_is_refused(model_dir: Path, tmp_path: Path) -> None:
    twin = graph_session(open_graph(write_graph(model_dir, tmp_path, context=32)))
    assert not isinstance(twin, CacheClearing)
    with pytest.raises(RecipeError, match=r"acceptance\.sustained\.clear_cache"):
        run(twin, clear=True)


def test_session_that_gives_too_few_tokens_is_not_run_for_minutes(session: Watched) -> None:
    class Short(Watched):
        def generate(
            self, prompts: Any, osl: int, options: BatchOptions | None = None
        ) -> Generation:
            return super().generate(prompts, osl, BatchOptions(osl_each=(2,) * len(prompts)))

    short = Short(session._model)
    with pytest.raises(PipelineError, match="its speed cannot be measured"):
        run(short)
    assert short.done == ["generate 2"]


def series(rate: float, memory: int, growth: int, count: int = 60) -> list[Sample]:
    return [
        Sample(t_s=float(t), output_tokens_per_s=rate if t >= 10 else 1.0,
               memory_bytes=memory + growth * t)
        for t in range(1, count)
    ]  # fmt: skip


def test_report_has_both_runs_and_what_clearing_changed() -> None:
    leaking, cleared = series(1000.0, 8 * 2**30, 2**20), series(900.0, 7 * 2**30, 0)
    document = sustained_json(leaking, LIMITS, "b2", cleared)
    other = document["cache_cleared"]
    assert other["effect"]["throughput_change"] == pytest.approx(-0.1)
    middle = 8 * 2**30 + 2**20 * (10 + 59) / 2
    assert other["effect"]["memory_change_bytes"] == pytest.approx(7 * 2**30 - middle, rel=1e-6)
    assert other["figures"]["memory_growth_bytes"] == 0.0
    assert document["figures"]["memory_growth_bytes"] == pytest.approx(49 * 2**20)
    assert len(other["samples"]) == 59
    # The run without clearing is the one that is judged.
    assert [finding.kind for finding in judge_sustained(leaking, LIMITS)] == ["rejected"]
    assert "cache_cleared" not in sustained_json(leaking, LIMITS, "b2")


def test_effect_is_not_known_of_too_little_or_without_memory() -> None:
    short = series(1000.0, 1, 0, count=9)
    told = sustained_json(series(1000.0, 1, 0), LIMITS, "b2", short)["cache_cleared"]
    assert told["effect"] == {"throughput_change": None, "memory_change_bytes": None}
    assert told["figures"] is None
    blind = [Sample(t_s=float(t), output_tokens_per_s=500.0) for t in range(60)]
    effect = sustained_json(series(1000.0, 1, 0), LIMITS, "b2", blind)["cache_cleared"]["effect"]
    assert effect == {"throughput_change": -0.5, "memory_change_bytes": None}


def test_page_shows_what_clearing_changed() -> None:
    document = sustained_json(
        series(1000.0, 8 * 2**30, 2**20), LIMITS, "b2", series(900.0, 7 * 2**30, 0)
    )
    text = Page(render_page(on_card(sustained=document))).text.replace("\u2212", "-")
    assert "its throughput -10.0%" in text
    assert "its memory growth 0.0 MiB" in text
    plain = sustained_json(series(1000.0, 1, 0), LIMITS, "b2")
    assert "its throughput" not in Page(render_page(on_card(sustained=plain))).text
