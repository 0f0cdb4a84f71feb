"""Every shipped recipe and option composes and plans; the production models' sizes and terms."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipeline.__main__ import Request, run
from pipeline.build import plan_of
from pipeline.config.compose import config_folders
from pipeline.config.load import Job, load
from pipeline.config.recipe import Recipe
from pipeline.core.errors import ExitCode, RecipeError
from pipeline.core.settings import data_dir
from pipeline.plan.ceilings import REACHABLE_SHARE
from pipeline.registry.package import require_publishable
from pipeline.sources.hub import HubSource
from tests.sources.hub_server import HubServer

GROUPS = {
    *("source", "target", "calibration", "quantizer"),
    *("compiler", "runner", "acceptance", "registry"),
}
PRODUCTION = ("llama3.1", "mistral", "phi3", "phi4-mini", "qwen2.5", "qwen3-4b", "qwen3-8b")
PAGED = ("checkpoint", "trtllm")
MAX_LINES = 25

RECIPES = sorted(path.stem for path in data_dir("recipes").glob("*.yaml"))
COMPILERS = sorted(path.stem for path in data_dir("conf").glob("compiler/*.yaml"))
FOUR_BIT = ("phi3-w4", "smollm2-w4")
REFUSED = {(recipe, "trtllm"): "trtllm engine cannot hold W4A16 weights" for recipe in FOUR_BIT}
for recipe in ("gemma3", "ministral3-8b"):
    REFUSED[recipe, "trtllm"] = "the converter for TensorRT-LLM has"
HARD = {"phi3-w4": ["acceptance.targets[0].min_output_tokens_per_s"]}
"""Recipe -> targets just beyond the share that is held to be reachable: it is here to find out."""
OPTIONS = sorted((path.parent.name, path.stem) for path in data_dir("conf").glob("*/*.yaml"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ships must not depend on the current directory."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def loaded(recipe: str, *overrides: str) -> Job:
    return load(recipe, overrides, folders=config_folders(None))


def recipe_of(name: str, compiler: str) -> Recipe:
    job = loaded(name, f"compiler={compiler}")
    assert job.faults == ()
    return job.value


def test_every_axis_has_options_and_there_is_no_other() -> None:
    assert {group for group, _ in OPTIONS} == GROUPS


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_short_and_becomes_objects_that_can_be_planned(recipe: str) -> None:
    text = (data_dir("recipes") / f"{recipe}.yaml").read_text()
    assert len(text.splitlines()) <= MAX_LINES
    job = loaded(recipe)
    assert job.faults == ()
    assert job.value.name == recipe
    assert plan_of(job.value).faults == ()
    if recipe in PRODUCTION:
        assert (job.value.compiler.format, job.value.target.id) == ("trtllm", "rtx4090")


@pytest.mark.parametrize(
    ("recipe", "compiler"),
    [pair for pair in itertools.product(RECIPES, COMPILERS) if pair not in REFUSED],
)
def test_recipe_can_be_planned_with_every_compiler(recipe: str, compiler: str) -> None:
    job = loaded(recipe, f"compiler={compiler}", "target=rtx4090")
    assert job.faults == ()
    assert job.value.compiler.format == compiler
    plan = plan_of(job.value)
    assert plan.faults == ()
    warned = [note.path for note in plan.notes if note.severity == "warning"]
    assert warned == HARD.get(recipe, [])
    assert plan.fit.full_length_sequences >= 1


@pytest.mark.parametrize(("recipe", "compiler"), REFUSED)
def test_recipe_is_refused_in_one_sentence_for_what_cannot_serve_it(
    recipe: str, compiler: str
) -> None:
    (fault,) = plan_of(loaded(recipe, f"compiler={compiler}").value).faults
    assert REFUSED[recipe, compiler] in str(fault)


def test_plan_says_which_precision_312_tokens_at_batch_1_take() -> None:
    """FP8 cannot on an RTX 4090, whatever the software; 4 bits leave room (3.62e9 weights)."""
    plan = plan_of(recipe_of("phi3-w4", "checkpoint"))
    rows = {row.name: row for row in plan.precisions}
    share = {name: row.workloads[0].share for name, row in rows.items()}
    assert [name for name in share if (share[name] or 0) > 1] == ["bf16", "fp8"]
    assert share["w4a16"] == plan.workloads[0].share == pytest.approx(0.655, abs=0.005)
    cache_bytes = 8 * plan.request.shape.num_layers
    weights = 3_623_878_656 * (0.5 + 2 / 128) + 2 * 197_072_256 + 16 * 128
    assert rows["w4a16"].workloads[0].ceiling_without_kv == pytest.approx(488, abs=2)
    assert rows["w4a16"].weight_bytes - weights - cache_bytes == pytest.approx(0, abs=1e6)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_becomes_an_object_but_for_what_a_recipe_must_say(group: str, option: str) -> None:
    job = loaded("smollm2", f"{group}={option}", "name=mine")
    assert job.config[group]
    own = [fault for fault in job.faults if fault.path.split(".")[0] == group]
    assert [fault for fault in own if not fault.message.startswith("is required")] == []


@pytest.mark.parametrize("compiler", PAGED)
@pytest.mark.parametrize("name", PRODUCTION)
def test_paged_sizes_take_128_requests_and_the_declared_workloads(name: str, compiler: str) -> None:
    made = recipe_of(name, compiler)
    limits = made.compiler.limits
    assert limits.max_batch_size == 128
    assert limits.max_seq_len == (2047 if name == "phi3" else 4096)
    assert limits.kv_cache_dtype == ("bfloat16" if name == "qwen2.5" else "fp8")
    # One step takes all prompts of the largest workload.
    assert limits.max_num_tokens >= max(w.batch * w.isl for w in made.acceptance.targets)


@pytest.mark.parametrize("name", PRODUCTION)
def test_static_cache_leaves_room_for_a_little_more(name: str) -> None:
    fit = plan_of(recipe_of(name, "trtrtx")).fit
    assert fit.static_kv_bytes < fit.kv_budget_bytes
    assert fit.static_kv_bytes > 0.7 * fit.kv_budget_bytes


@pytest.mark.parametrize("name", PRODUCTION)
def test_targets_are_312_at_batch_4_and_65_percent_at_batch_64(name: str) -> None:
    plan = plan_of(recipe_of(name, "trtllm"))
    small, large = plan.workloads
    assert (small.batch, small.isl, small.osl, small.target) == (4, 128, 256, 312.0)
    assert (large.batch, large.isl, large.osl, large.share) == (64, 128, 256, 0.65)
    assert small.share is not None
    assert small.share <= REACHABLE_SHARE


@pytest.mark.parametrize("name", PRODUCTION)
def test_weights_are_pinned_and_their_shape_names_the_same_commit(name: str) -> None:
    source = recipe_of(name, "checkpoint").source
    assert isinstance(source, HubSource)
    shape = (data_dir("recipes") / "shapes" / f"{name}.yaml").read_text()
    assert shape.startswith(f"# {source.repo_id} on the Hugging Face Hub at commit ")
    assert re.findall(r"\b[0-9a-f]{40}\b", shape.splitlines()[0]) == [source.revision]


@pytest.mark.parametrize(
    ("name", "gated", "redistribution"),
    [
        ("phi3", False, "allowed"),
        ("phi4-mini", False, "allowed"),
        ("qwen2.5", False, "allowed"),
        ("qwen3-4b", False, "allowed"),
        ("qwen3-8b", False, "allowed"),
        ("mistral", True, "allowed"),
        ("llama3.1", True, "with-notice"),
    ],
)
def test_terms_of_the_weights(name: str, gated: bool, redistribution: str) -> None:
    terms = recipe_of(name, "checkpoint").source.terms
    assert (terms.gated, terms.redistribution) == (gated, redistribution)
    with pytest.raises(RecipeError) if gated else nullcontext():
        require_publishable(terms, public=True)
    assert terms.acknowledged is None, "that is for the user to say"
    assert ("Built with Llama" in terms.notice) == (redistribution == "with-notice")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_any")
        yield server


def test_gated_recipe_is_refused_before_any_download_until_it_is_acknowledged(
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "llama3.1"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    licence = recipe_of(name, "checkpoint").source.terms.spdx
    assert run(Request(recipe=name, overrides=("compiler=checkpoint",))) is ExitCode.USAGE
    assert f"set source.acknowledge_licence={licence}" in capsys.readouterr().err
    assert hub.requests == []

    acknowledged = ("compiler=checkpoint", f"source.acknowledge_licence={licence}")
    # The server has another repository: this far it now comes.
    assert run(Request(recipe=name, overrides=acknowledged)) is ExitCode.NOT_FOUND
    assert hub.requests != []
