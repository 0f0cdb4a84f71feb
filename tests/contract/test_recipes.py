"""Every shipped recipe and option composes, builds its objects on a CPU, and can be planned."""

from __future__ import annotations

import itertools

import pytest

from pipeline.config.folders import config_folders
from pipeline.config.load import Job, load
from pipeline.core.data import data_dir
from pipeline.formats.spec import format_spec

GROUPS = {
    "source",
    "target",
    "calibration",
    "quantizer",
    "compiler",
    "runner",
    "acceptance",
    "registry",
}
MAX_LINES = 25

RECIPES = sorted(path.stem for path in data_dir("recipes").glob("*.yaml"))
SHAPES = sorted(path.stem for path in data_dir("recipes").glob("shapes/*.yaml"))
COMPILERS = sorted(path.stem for path in data_dir("conf").glob("compiler/*.yaml"))
VLLM_ONLY = ("smollm2-vllm", "trtllm")
"""`trtllm-bench` sends whole batches, and this recipe counts requests."""
OPTIONS = sorted((path.parent.name, path.stem) for path in data_dir("conf").glob("*/*.yaml"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ships must not depend on the current directory."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def loaded(recipe: str, *overrides: str) -> Job:
    job = load(recipe, overrides, folders=config_folders(None))
    return job


def test_every_axis_has_options_and_there_is_no_other() -> None:
    assert {group for group, _ in OPTIONS} == GROUPS


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_becomes_objects(recipe: str) -> None:
    job = loaded(recipe)
    assert job.faults == ()
    assert job.value.name == recipe


@pytest.mark.parametrize(
    ("recipe", "compiler"),
    [pair for pair in itertools.product(RECIPES, COMPILERS) if pair != VLLM_ONLY],
)
def test_recipe_can_be_planned_with_every_compiler(recipe: str, compiler: str) -> None:
    from pipeline.build import plan_of

    job = loaded(recipe, f"compiler={compiler}", "target=rtx4090")
    assert job.faults == ()
    assert job.value.compiler.format == compiler
    plan = plan_of(job.value)
    assert plan.faults == ()
    assert [note for note in plan.notes if note.severity == "warning"] == []
    assert plan.fit.full_length_sequences >= 1


def test_recipe_for_vllm_is_refused_for_what_cannot_serve_its_requests() -> None:
    from pipeline.build import plan_of

    recipe, compiler = VLLM_ONLY
    (fault,) = plan_of(loaded(recipe, f"compiler={compiler}").value).faults
    assert "runner trtllm does not execute requests" in str(fault)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_can_be_planned_as_it_is(recipe: str) -> None:
    from pipeline.build import plan_of

    assert plan_of(loaded(recipe).value).faults == ()


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiler_chooses_the_runner_that_its_format_names(compiler: str) -> None:
    recipe = loaded("smollm2", f"compiler={compiler}").value
    assert recipe.runner.name == format_spec(recipe.compiler.format).substitute


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_short(recipe: str) -> None:
    text = (data_dir("recipes") / f"{recipe}.yaml").read_text()
    assert len(text.splitlines()) <= MAX_LINES


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_becomes_an_object_but_for_what_a_recipe_must_say(group: str, option: str) -> None:
    job = loaded("smollm2", f"{group}={option}", "name=mine")
    assert job.config[group]
    own = [fault for fault in job.faults if fault.path.split(".")[0] == group]
    assert [fault for fault in own if not fault.message.startswith("is required")] == []


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_becomes_an_object(shape: str) -> None:
    job = loaded("smollm2", f"shapes@shape={shape}")
    assert [fault for fault in job.faults if fault.path.startswith("shape")] == []
    assert job.value.shape.params > 0
