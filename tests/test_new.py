"""`enginesmith new`, from a folder and the Hub: what it writes loads, and overwrites nothing."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.build import plan_of
from pipeline.cli import main
from pipeline.config.compose import config_folders
from pipeline.config.load import load
from pipeline.config.recipe import Recipe
from pipeline.core.errors import (
    AccessError,
    ConflictError,
    NotFoundError,
    PipelineError,
    RecipeError,
)
from pipeline.model.read import spec_faults
from pipeline.new import NewRecipe, new_recipe, place, report
from pipeline.sources.hub import HubSource
from tests.architectures import tiny_architecture
from tests.sources.hub_server import COMMIT, REPO, TOKEN, HubServer
from tests.specs import CONFIGS, published

LLAMA = "llama-3.2-1b-instruct"


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with `recipes/`."""
    work = tmp_path / "work"
    (work / "recipes").mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return work


def folder_of(config: dict[str, Any], name: str = "model") -> Path:
    folder = Path(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def new(origin: Path | str = REPO, name: str = "mine", **options: Any) -> NewRecipe:
    asked = {"revision": None, "target": "rtx4090", "config_dir": None}
    return new_recipe(name, origin=str(origin), **(asked | options))


def loaded(name: str = "mine", *overrides: str) -> Recipe:
    job = load(name, overrides, folders=config_folders(None))
    assert job.faults == ()
    return job.value


def written() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*.*") if "model" not in path.parts)


@pytest.mark.parametrize("name", ["llama3.1", "phi3-long", "qwen2.5"])
def test_tiny_model_makes_a_round_trip(name: str) -> None:
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
        (LLAMA, "fp8", 4096),
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
        new(folder_of(published("llama-2-13b", intermediate_size=110_592)))
    assert error.value.exit_code == 2
    assert "at batch 8 x context 512, the smallest that is tried" in str(error.value)
    assert "the model does not fit rtx4090, by " in str(error.value)
    assert written() == []


@pytest.mark.parametrize(
    ("target", "width", "why"),
    [("rtx4090", 34_560, "does not fit rtx4090"), ("a100", 13_824, "no FP8 tensor cores")],
)
def test_card_that_cannot_have_fp8_gets_four_bits_and_is_told_why(
    target: str, width: int, why: str
) -> None:
    made = new(folder_of(published("llama-2-13b", intermediate_size=width)), target=target)
    assert "trtllm" not in made.sizes  # which cannot hold them
    assert why in made.left_out["fp8"]
    recipe = loaded()
    assert recipe.quantizer.precision == "w4a16"
    assert plan_of(recipe).faults == ()


def test_card_without_a_format_leaves_its_sizes_out_and_says_why() -> None:
    made = new(folder_of(published(LLAMA)), target="h100")
    assert tuple(made.sizes) == ("trtllm", "checkpoint")
    assert "TensorRT-RTX has no Hopper" in made.left_out["trtrtx"]
    assert any("TensorRT-RTX has no Hopper" in line for line in report(made, None))
    assert loaded().target.id == "h100"
    job = load("mine", ["compiler=trtrtx"], folders=config_folders(None))
    assert "TensorRT-RTX has no Hopper" in plan_of(job.value).faults[0].message


def test_name_that_exists_is_a_conflict_and_is_left_as_it_is() -> None:
    folder = folder_of(published(LLAMA))
    for shipped in ("smollm2", "phi3", "build"):
        with pytest.raises(ConflictError) as error:
            new(folder, name=shipped)
        assert error.value.exit_code == 8
    new(folder)
    before = {path: Path(path).read_bytes() for path in written()}
    with pytest.raises(ConflictError, match=r"mine\.yaml exists"):
        new(folder, target="l4")
    assert {path: Path(path).read_bytes() for path in written()} == before
    Path("recipes/mine.yaml").unlink()
    for orphan in ("shapes/mine.yaml", "sizes/mine"):
        with pytest.raises(ConflictError, match=f"{orphan} exists"):
            new(folder)
        Path("recipes", "shapes", "mine.yaml").unlink(missing_ok=True)


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
        new(folder_of(published(LLAMA)), name=name, **options)
    assert written() == []


def test_what_is_no_model_and_no_repository_is_refused() -> None:
    Path("model").mkdir()
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        new(Path("model"))
    for missing in ("./nowhere", "/nowhere/at/all", "~/nowhere"):
        with pytest.raises(NotFoundError, match="is not a folder"):
            new(missing)
    with pytest.raises(RecipeError, match="neither a folder nor <owner>/<name>"):
        new("a b")


def test_folder_with_any_name_is_found_again() -> None:
    folder = folder_of(published(LLAMA), name="it's: a ${dir} # 1")
    new(folder)
    assert loaded().source.path == folder.resolve()  # type: ignore[attr-defined]


def test_printed_commands_work_wherever_the_recipe_went(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def enginesmith(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["enginesmith", *words])
        assert main() == 0, capsys.readouterr().err
        return capsys.readouterr().out

    folder_of(published(LLAMA))
    for name, words, place_of in [
        ("first", (), "recipes"), ("second", ("--config-dir", "own dir"), "own dir"),
        ("third", (), "."),
    ]:  # fmt: skip
        if place_of == ".":
            (workdir / "recipes").rename(workdir / "not-recipes")
        (workdir / place_of).mkdir(exist_ok=True)
        shown = enginesmith("new", name, "--from", "./model", *words)
        assert (workdir / place_of / f"{name}.yaml").is_file()
        plan, build = shown.splitlines()[-2:]
        assert build.split()[:3] == ["enginesmith", "build", name]
        assert "no public registry" in shown, "the folder states no licence"
        assert json.loads(enginesmith(*shlex.split(plan)[1:], "--json"))["name"] == name


SET = {Path("sizes/mine/a.yaml"): "1\n", Path("shapes/mine.yaml"): "2\n", Path("mine.yaml"): "3\n"}


@pytest.mark.parametrize("stop", SET)
def test_what_stops_the_writing_leaves_nothing(stop: Path, workdir: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        place({**SET, stop: "\ud800"}, workdir / "recipes")
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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tags=("text-generation", "license:apache-2.0")) as server:
        server.files["config.json"] = (CONFIGS / f"{LLAMA}.json").read_bytes()
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_recipe_pins_the_commit_and_asks_for_the_config_alone(
    hub: HubServer, workdir: Path, revision: str | None
) -> None:
    new(revision=revision)
    recipe = loaded()
    assert isinstance(recipe.source, HubSource)
    assert (recipe.source.repo_id, recipe.source.revision) == (REPO, COMMIT)
    assert plan_of(recipe).faults == ()
    shape = Path("recipes/shapes/mine.yaml").read_text()
    assert shape.startswith(f"# {REPO} on the Hugging Face Hub at commit {COMMIT}.")
    # Only files are counted: the library may ask for data of its own, once in a while.
    files = [request.path for request in hub.requests if "/resolve" in request.path]
    assert {path.rpartition("/")[2] for path in files} == {"config.json"}
    assert not (workdir.parent / "cache").exists()


def test_gated_repository_needs_a_token_and_says_how_to_publish(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated, hub.tags = True, ("license:llama3.2",)
    with pytest.raises(AccessError, match="set HF_TOKEN"):
        new()
    assert list(Path("recipes").iterdir()) == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    made = new()
    terms = loaded().source.terms
    assert (terms.gated, terms.acknowledged) == (True, None)
    assert len(Path("recipes/mine.yaml").read_text().splitlines()) <= 28
    wanted = "source.acknowledge_licence=LicenseRef-Llama-3.2-Community"
    assert any(wanted in line for line in report(made, None))
    assert wanted in Path("recipes/mine.yaml").read_text().splitlines()[0]


def test_hub_that_gives_no_commit_is_an_error_and_no_recipe(hub: HubServer) -> None:
    listing = hub.listing
    hub.listing = lambda: {**listing(), "sha": "main"}  # type: ignore[method-assign]
    with pytest.raises(PipelineError, match=r"gives no commit.*unset HF_ENDPOINT"):
        new()
