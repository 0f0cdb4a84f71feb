"""`enginesmith new` from a folder: what it writes loads, plans, and overwrites nothing."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.build import plan_of
from pipeline.config.folders import config_folders
from pipeline.config.load import load
from pipeline.config.recipe import Recipe
from pipeline.core.errors import ConflictError, NotFoundError, RecipeError
from pipeline.model.read import spec_faults
from pipeline.new.command import NewRecipe, new_recipe, place, report
from tests.architectures import ARCHITECTURES, tiny_architecture
from tests.specs import published
from tests.tiny_recipe import ROOT


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with `recipes/`."""
    work = tmp_path / "work"
    (work / "recipes").mkdir(parents=True)
    monkeypatch.chdir(work)
    return work


def folder_of(config: dict[str, Any], name: str = "model") -> Path:
    folder = Path(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def new(folder: Path, name: str = "mine", **options: Any) -> NewRecipe:
    asked = {"revision": None, "target": "rtx4090", "config_dir": None}
    return new_recipe(name, origin=str(folder), **(asked | options))


def loaded(name: str = "mine", *overrides: str, config_dir: Path | None = None) -> Recipe:
    job = load(name, overrides, folders=config_folders(config_dir))
    assert job.faults == ()
    recipe: Recipe = job.value
    return recipe


def written() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*.*") if "model" not in path.parts)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tiny_model_makes_a_round_trip(name: str) -> None:
    folder = tiny_architecture(name, Path("model"))
    made = new(folder, name="tiny-" + name)
    assert tuple(made.sizes) == ("trtllm", "trtrtx", "checkpoint")
    assert made.left_out == {}
    for compiler in made.sizes:
        recipe = loaded("tiny-" + name, f"compiler={compiler}")
        assert plan_of(recipe).faults == ()
        assert spec_faults(recipe.shape, json.loads((folder / "config.json").read_text())) == []
        recipe.acceptance.check_inputs(recipe.shape, recipe.compiler.limits.max_seq_len)
        kv = "bfloat16" if compiler == "trtrtx" or name.startswith("qwen") else "fp8"
        assert recipe.compiler.limits.kv_cache_dtype == kv
    assert loaded("tiny-" + name).compiler.format == "trtllm"


@pytest.mark.parametrize(
    ("model", "kv_cache_dtype", "context"),
    [
        ("llama-3.2-1b-instruct", "fp8", 4096),
        ("phi-4-mini-instruct", "fp8", 4096),  # where its short factors end, of 131072
        ("qwen2.5-0.5b-instruct", "bfloat16", 4096),
        ("phi-3-mini-4k-instruct", "fp8", 2047),  # its sliding window
    ],
)
def test_published_siblings_get_sizes_kv_dtype_and_two_workloads(
    model: str, kv_cache_dtype: str, context: int
) -> None:
    new(folder_of(published(model)))
    recipe = loaded()
    limits = recipe.compiler.limits
    assert (limits.max_batch_size, limits.max_seq_len) == (128, context)
    assert (limits.max_num_tokens, limits.kv_cache_dtype) == (8192, kv_cache_dtype)
    plan = plan_of(recipe)
    assert [(w.batch, w.isl, w.osl, w.share) for w in plan.workloads] == [
        (4, 128, 256, 0.65),
        (64, 128, 256, 0.65),
    ]
    assert (plan.faults, plan.notes) == ((), ())
    recipe_text = Path("recipes/mine.yaml").read_text()
    assert len(recipe_text.splitlines()) <= 25


def test_shipped_recipe_and_new_one_of_the_same_model_agree_on_the_shape() -> None:
    new(folder_of(published("phi-3-mini-4k-instruct")))
    assert loaded().shape == loaded("phi3", "compiler=checkpoint").shape


def test_smaller_card_and_larger_model_get_smaller_sizes() -> None:
    made = new(folder_of(published("llama-2-13b")))
    paged, static = made.sizes["trtllm"], made.sizes["trtrtx"]
    assert 4 <= static.batch < paged.batch < 64
    batches = [workload.batch for workload in loaded().acceptance.targets]
    assert batches == [4, static.batch]
    # One more does not fit: it is the largest that the recipe's own plan accepts.
    limits = loaded("mine", "compiler=trtrtx").compiler.limits
    more = (f"compiler.max_batch_size={limits.max_batch_size + 1}", "compiler=trtrtx")
    assert [f.path for f in plan_of(loaded("mine", *more)).faults] == ["compiler.max_batch_size"]
    assert plan_of(loaded("mine", "compiler=trtrtx")).fit.full_length_sequences == static.batch


def test_model_too_large_exits_2_with_the_amount_and_writes_nothing() -> None:
    with pytest.raises(RecipeError) as error:
        new(folder_of(published("llama-2-13b", num_hidden_layers=200)))
    assert error.value.exit_code == 2
    assert "at batch 8 x context 512, the smallest that is tried" in str(error.value)
    assert "the model does not fit rtx4090, by " in str(error.value)
    assert written() == []


def test_card_without_a_format_leaves_its_sizes_out_and_says_why() -> None:
    made = new(folder_of(published("llama-3.2-1b-instruct")), target="h100")
    assert tuple(made.sizes) == ("trtllm", "checkpoint")
    assert "TensorRT-RTX has no Hopper" in made.left_out["trtrtx"]
    assert any("TensorRT-RTX has no Hopper" in line for line in report(made, None))
    assert loaded().target.id == "h100"
    job = load("mine", ["compiler=trtrtx"], folders=config_folders(None))
    assert "TensorRT-RTX has no Hopper" in plan_of(job.value).faults[0].message


def test_card_without_fp8_is_refused() -> None:
    with pytest.raises(RecipeError, match="no FP8 tensor cores"):
        new(folder_of(published("llama-3.2-1b-instruct")), target="a100")
    assert written() == []


def test_name_that_exists_is_a_conflict_and_is_left_as_it_is() -> None:
    folder = folder_of(published("llama-3.2-1b-instruct"))
    for shipped in ("smollm2", "phi3", "build"):
        with pytest.raises(ConflictError) as error:
            new(folder, name=shipped)
        assert error.value.exit_code == 8
    new(folder)
    before = {path: Path(path).read_bytes() for path in written()}
    with pytest.raises(ConflictError, match=r"mine\.yaml exists"):
        new(folder, target="l4")
    assert {path: Path(path).read_bytes() for path in written()} == before


@pytest.mark.parametrize("orphan", ["shapes/mine.yaml", "sizes/mine/trtllm.yaml"])
def test_file_of_yours_under_that_name_is_a_conflict(orphan: str) -> None:
    path = Path("recipes") / orphan
    path.parent.mkdir(parents=True)
    path.write_text("yours\n")
    with pytest.raises(ConflictError, match="exists"):
        new(folder_of(published("llama-3.2-1b-instruct")))
    assert written() == [str(path)]
    assert path.read_text() == "yours\n"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("My_Model", {}, "did you mean my-model"),
        ("../up", {}, "is not a name"),
        ("mine", {"target": "rtx4091"}, "did you mean rtx4090"),
        ("mine", {"revision": "main"}, "only a Hub repository has revisions"),
    ],
)
def test_wrong_words_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        new(folder_of(published("llama-3.2-1b-instruct")), name=name, **options)
    assert written() == []


@pytest.mark.parametrize("origin", ["./nowhere", "/nowhere/at/all", "~/nowhere"])
def test_missing_folder_is_not_taken_for_a_repository(origin: str) -> None:
    with pytest.raises(NotFoundError, match="is not a folder"):
        new_recipe("mine", origin=origin, revision=None, target="l4", config_dir=None)


def test_folder_without_a_config_and_no_name_at_all() -> None:
    Path("model").mkdir()
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        new(Path("model"))
    with pytest.raises(RecipeError, match="neither a folder nor <owner>/<name>"):
        new_recipe("mine", origin="a b", revision=None, target="l4", config_dir=None)


def test_folder_with_any_name_is_found_again() -> None:
    folder = folder_of(published("llama-3.2-1b-instruct"), name="it's: a ${dir} # 1")
    new(folder)
    assert loaded().source.path == folder.resolve()  # type: ignore[attr-defined]


def test_licence_nobody_stated_goes_to_no_public_registry() -> None:
    made = new(folder_of(published("llama-3.2-1b-instruct")))
    assert loaded().source.terms.redistribution == "forbidden"
    assert any("no public registry" in line for line in report(made, None))


def test_printed_commands_work_wherever_the_recipe_went(workdir: Path) -> None:
    folder_of(published("llama-3.2-1b-instruct"))
    for words, place_of in [((), "recipes"), (("--config-dir", "own dir"), "own dir")]:
        (workdir / place_of).mkdir(exist_ok=True)
        name = f"in-{place_of.replace(' ', '-')}"
        done = enginesmith("new", name, "--from", "./model", *words)
        assert done.returncode == 0, done.stderr
        assert (workdir / place_of / f"{name}.yaml").is_file()
        plan, build = done.stdout.splitlines()[-2:]
        assert build.split()[:3] == ["enginesmith", "build", name]
        planned = enginesmith(*shlex.split(plan)[1:], "--json")
        assert planned.returncode == 0, planned.stderr
        assert json.loads(planned.stdout)["name"] == name


def test_without_a_recipes_folder_it_goes_here(workdir: Path) -> None:
    (workdir / "recipes").rmdir()
    folder_of(published("llama-3.2-1b-instruct"))
    done = enginesmith("new", "mine", "--from", "./model", "--target", "l4")
    assert done.returncode == 0, done.stderr
    assert (workdir / "mine.yaml").is_file()
    assert done.stdout.splitlines()[-2].endswith("plan mine --config-dir .")


def enginesmith(*words: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


SET = {Path("sizes/mine/a.yaml"): "1\n", Path("shapes/mine.yaml"): "2\n", Path("mine.yaml"): "3\n"}


class Stopped(dict[Path, str]):
    """A set of files whose writer is stopped at one of them."""

    def __init__(self, stop: Path) -> None:
        super().__init__(SET)
        self._stop = stop

    def items(self) -> Any:
        for path, text in super().items():
            if path == self._stop:
                raise KeyboardInterrupt
            yield path, text


@pytest.mark.parametrize("stop", SET)
def test_what_stops_the_writing_leaves_nothing(stop: Path, workdir: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        place(Stopped(stop), workdir / "recipes")
    assert written() == []
    assert list((workdir / "recipes").iterdir()) == []


@pytest.mark.parametrize("taken", SET)
def test_file_that_appears_meanwhile_is_kept_and_nothing_else_is_left(
    taken: Path, workdir: Path
) -> None:
    path = workdir / "recipes" / taken
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("theirs\n")
    with pytest.raises(ConflictError, match=f"{taken} exists"):
        place(SET, workdir / "recipes")
    assert written() == [str(Path("recipes") / taken)]
    assert path.read_text() == "theirs\n"


def test_recipe_is_the_last_file_to_appear(workdir: Path) -> None:
    # A recipe that can be seen is whole: everything that it names was written before it.
    recipes = workdir / "recipes"
    place(SET, recipes)
    order = sorted(SET, key=lambda path: (recipes / path).stat().st_mtime_ns)
    assert order == list(SET)
    assert all((recipes / path).read_text() == text for path, text in SET.items())
    assert not list(recipes.rglob("*.partial"))
