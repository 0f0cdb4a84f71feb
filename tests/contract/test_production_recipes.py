"""The recipes of the models that this project is for: sizes, targets, terms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipeline.__main__ import Request, run
from pipeline.build import plan_of
from pipeline.config.folders import config_folders
from pipeline.config.load import load
from pipeline.config.recipe import Recipe
from pipeline.core.data import data_dir
from pipeline.core.errors import ExitCode, RecipeError
from pipeline.plan.ceilings import REACHABLE_SHARE
from pipeline.registry.package import require_publishable
from pipeline.sources.hub import HubSource
from tests.sources.hub_server import HubServer

PRODUCTION = ("llama3.1", "mistral", "phi3", "qwen2.5")
PAGED = ("checkpoint", "trtllm")


def recipe(name: str, compiler: str, *overrides: str) -> Recipe:
    job = load(name, [f"compiler={compiler}", *overrides], folders=config_folders(None))
    assert job.faults == ()
    value: Recipe = job.value
    return value


def test_default_compiler_is_trtllm_and_the_card_an_rtx_4090() -> None:
    for name in PRODUCTION:
        job = load(name, [], folders=config_folders(None))
        assert job.faults == ()
        assert (job.value.compiler.format, job.value.target.id) == ("trtllm", "rtx4090")


@pytest.mark.parametrize("compiler", PAGED)
@pytest.mark.parametrize("name", PRODUCTION)
def test_paged_sizes_take_128_requests_and_the_declared_workloads(name: str, compiler: str) -> None:
    made = recipe(name, compiler)
    limits = made.compiler.limits
    assert limits.max_batch_size == 128
    assert limits.max_seq_len == (2047 if name == "phi3" else 4096)
    assert limits.kv_cache_dtype == ("bfloat16" if name == "qwen2.5" else "fp8")
    # One step takes all prompts of the largest workload.
    assert limits.max_num_tokens >= max(w.batch * w.isl for w in made.acceptance.targets)


def test_phi3_stays_within_its_sliding_window_in_every_format() -> None:
    for compiler in (*PAGED, "trtrtx"):
        made = recipe("phi3", compiler)
        assert made.shape.window is not None
        assert made.compiler.limits.max_seq_len <= made.shape.window
        assert plan_of(made).notes == ()


@pytest.mark.parametrize("name", PRODUCTION)
def test_static_cache_leaves_room_for_a_little_more(name: str) -> None:
    fit = plan_of(recipe(name, "trtrtx")).fit
    assert fit.static_kv_bytes < fit.kv_budget_bytes
    assert fit.static_kv_bytes > 0.7 * fit.kv_budget_bytes


@pytest.mark.parametrize("name", PRODUCTION)
def test_targets_are_312_at_batch_4_and_65_percent_at_batch_64(name: str) -> None:
    plan = plan_of(recipe(name, "trtllm"))
    small, large = plan.workloads
    assert (small.batch, small.isl, small.osl, small.target) == (4, 128, 256, 312.0)
    assert (large.batch, large.isl, large.osl, large.share) == (64, 128, 256, 0.65)
    assert small.share is not None
    assert small.share <= REACHABLE_SHARE


@pytest.mark.parametrize("name", PRODUCTION)
def test_weights_are_pinned_and_their_shape_names_the_same_commit(name: str) -> None:
    source = recipe(name, "checkpoint").source
    assert isinstance(source, HubSource)
    shape = (data_dir("recipes") / "shapes" / f"{name}.yaml").read_text()
    assert shape.startswith(f"# {source.repo_id} on the Hugging Face Hub at commit ")
    assert re.findall(r"\b[0-9a-f]{40}\b", shape.splitlines()[0]) == [source.revision]


@pytest.mark.parametrize(
    ("name", "gated", "redistribution"),
    [
        ("phi3", False, "allowed"),
        ("qwen2.5", False, "allowed"),
        ("mistral", True, "allowed"),
        ("llama3.1", True, "with-notice"),
    ],
)
def test_terms_of_the_weights(name: str, gated: bool, redistribution: str) -> None:
    terms = recipe(name, "checkpoint").source.terms
    assert (terms.gated, terms.redistribution) == (gated, redistribution)
    with pytest.raises(RecipeError) if gated else nullcontext():
        require_publishable(terms, public=True)
    assert terms.acknowledged is None, "that is for the user to say"


def test_llama_carries_its_notice() -> None:
    notice = recipe("llama3.1", "checkpoint").source.terms.notice
    assert "Built with Llama" in notice
    assert "Llama 3.1 is licensed under the Llama 3.1 Community License" in notice


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_any")
        yield server


@pytest.mark.parametrize("name", ["llama3.1", "mistral"])
def test_gated_recipe_is_refused_before_any_download_until_it_is_acknowledged(
    name: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    licence = recipe(name, "checkpoint").source.terms.spdx
    assert run(Request(recipe=name, overrides=("compiler=checkpoint",))) is ExitCode.USAGE
    assert f"set source.acknowledge_licence={licence}" in capsys.readouterr().err
    assert hub.requests == []

    acknowledged = ("compiler=checkpoint", f"source.acknowledge_licence={licence}")
    # The server has another repository: this far it now comes.
    assert run(Request(recipe=name, overrides=acknowledged)) is ExitCode.NOT_FOUND
    assert hub.requests != []
