"""Recipes, overrides and sweeps -> jobs with objects, or with every fault at once."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

import pipeline
from pipeline.config.folders import ConfigFolders, config_folders
from pipeline.config.load import Job, Loaded, load
from pipeline.core.data import data_dir
from pipeline.core.errors import RecipeError
from pipeline.core.settings import STRICT, Listed, PathField


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Workload:
    batch: PositiveInt
    floor_tok_s: PositiveFloat = 1.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Compiler:
    max_batch_size: PositiveInt
    max_seq_len: PositiveInt
    kv_cache_dtype: Literal["fp8", "bf16"] = "fp8"
    timing_cache: PathField | None = None
    workloads: Listed[Workload] = ()

    def __post_init__(self) -> None:
        if self.max_seq_len < self.max_batch_size:
            raise ValueError("max_seq_len must be >= max_batch_size; increase max_seq_len")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Source:
    repo: str
    commit: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    source: Source
    compiler: Compiler


BASE = {
    "conf/build.yaml": """
        defaults: [{source: hub}, {compiler: rtx}]
        _target_: toy_parts.Recipe
        name: ???""",
    "conf/source/hub.yaml": """
        _target_: toy_parts.Source
        repo: ???
        commit: ???""",
    "conf/source/local.yaml": """
        _target_: toy_parts.Source
        repo: here
        commit: none""",
    "conf/compiler/rtx.yaml": """
        _target_: toy_parts.Compiler
        max_batch_size: 8
        max_seq_len: 1024
        workloads:
          - {_target_: toy_parts.Workload, batch: 1}
          - {_target_: toy_parts.Workload, batch: 8}""",
    "conf/compiler/llm.yaml": """
        _target_: toy_parts.Compiler
        max_batch_size: 64
        max_seq_len: 4096""",
    "recipes/smol.yaml": """
        defaults: [build, _self_]
        name: smol
        source: {repo: org/smol, commit: abc}""",
    "recipes/phi3.yaml": """
        defaults: [build, {override compiler: llm}, _self_]
        name: phi3
        source: {repo: org/phi3, commit: def}""",
}

Write = Callable[[str, str], None]
Loader = Callable[..., Loaded]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(path: str, text: str) -> None:
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = [line.removeprefix(" " * 8) for line in text.splitlines()]
        target.write_text("\n".join(lines) + "\n")

    return write


@pytest.fixture
def folders(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> ConfigFolders:
    monkeypatch.setitem(sys.modules, "toy_parts", sys.modules[__name__])
    for path, text in BASE.items():
        write(path, text)
    return ConfigFolders(recipes=(tmp_path / "recipes",), conf=tmp_path / "conf")


@pytest.fixture
def run(folders: ConfigFolders) -> Loader:
    def run(recipes: str, *overrides: str, multirun: bool = False) -> Loaded:
        return load(recipes, overrides, folders=folders, multirun=multirun)

    return run


@pytest.fixture
def job(run: Loader) -> Callable[..., Job]:
    def job(recipe: str, *overrides: str) -> Job:
        loaded = run(recipe, *overrides)
        assert loaded.faults == ()
        (only,) = loaded.jobs
        return only

    return job


def messages(job: Job) -> dict[str, str]:
    return {fault.path: fault.message for fault in job.faults}


def test_recipe_becomes_typed_objects(job: Callable[..., Job]) -> None:
    built = job("smol", "compiler.max_batch_size=4", "compiler.timing_cache=/x y/z")
    assert built.faults == ()
    assert built.value == Recipe(
        name="smol",
        source=Source(repo="org/smol", commit="abc"),
        compiler=Compiler(
            max_batch_size=4,
            max_seq_len=1024,
            timing_cache=Path("/x y/z"),
            workloads=(Workload(batch=1), Workload(batch=8)),
        ),
    )
    assert built.config["compiler"]["max_batch_size"] == 4
    assert built.config["source"] == {
        "_target_": "toy_parts.Source",
        "repo": "org/smol",
        "commit": "abc",
    }


def test_option_of_a_group_replaces_its_section(job: Callable[..., Job]) -> None:
    assert job("smol", "compiler=llm").value.compiler.max_batch_size == 64
    assert job("phi3").value.compiler.max_batch_size == 64


def test_unknown_key_wrong_type_and_batch_0_are_reported_together(
    job: Callable[..., Job],
) -> None:
    found = messages(
        job("smol", "compiler.max_batch_sise=8", "compiler.max_seq_len=long",
            "compiler.max_batch_size=0")
    )  # fmt: skip
    assert set(found) == {
        "compiler.max_batch_sise",
        "compiler.max_seq_len",
        "compiler.max_batch_size",
    }
    assert "did you mean compiler.max_batch_size?" in found["compiler.max_batch_sise"]
    assert found["compiler.max_seq_len"] == 'got "long", wanted a whole number'
    assert found["compiler.max_batch_size"] == "got 0, wanted a number > 0"


def test_unknown_recipe_does_not_hide_bad_overrides(job: Callable[..., Job]) -> None:
    bad = job("smoll", "compiler.max_batch_sise=8", "compiler.max_batch_size=0")
    assert len(bad.faults) == 3
    assert "did you mean smol? allowed: phi3, smol" in bad.faults[0].message
    assert bad.value is None
    assert bad.config == {}


def test_unknown_recipe_unlike_any_other_is_one_fault(job: Callable[..., Job]) -> None:
    (fault,) = job("zzzz").faults
    assert fault.message == "there is no recipe 'zzzz'; allowed: phi3, smol"


def test_faults_of_every_section_appear_though_one_cannot_be_built(
    job: Callable[..., Job], write: Write
) -> None:
    write(
        "recipes/bad.yaml",
        """
        defaults: [build, _self_]
        nam: bad
        source: {repo: 3}
        compiler:
          kv_cache_dtype: fp9
          workloads:
            - {_target_: toy_parts.Workload, batch: 0, floor_tok_s: fast}""",
    )
    assert messages(job("bad")) == {
        "name": "is required; set name=VALUE or put it in the recipe",
        "nam": "there is no such key; did you mean name? allowed: compiler, name, source",
        "source.commit": "is required; set source.commit=VALUE or put it in the recipe",
        "source.repo": "got 3, wanted text",
        "compiler.kv_cache_dtype": "got \"fp9\", wanted 'fp8' or 'bf16'; did you mean fp8?",
        "compiler.workloads.0.batch": "got 0, wanted a number > 0",
        "compiler.workloads.0.floor_tok_s": 'got "fast", wanted a number',
    }


def test_fault_between_fields_names_its_section(job: Callable[..., Job]) -> None:
    found = messages(job("smol", "compiler.max_seq_len=1"))
    assert found == {"compiler": "max_seq_len must be >= max_batch_size; increase max_seq_len"}


@pytest.mark.parametrize(
    ("override", "path", "message"),
    [
        ("compiler=rtxx", "compiler", "there is no option 'rtxx'; did you mean rtx? allowed"),
        ("compilr.max_seq_len=8", "compilr.max_seq_len", "did you mean compiler? allowed"),
        ("max_seq_len=8", "max_seq_len", "did you mean compiler.max_seq_len?"),
        ("compiler.max_seq_len.x=8", "compiler.max_seq_len.x", "is a value, not a section"),
        ("compiler.workloads.5.batch=8", "compiler.workloads.5.batch", "items 0 to 1"),
        ("+compiler.tactic=8", "compiler.tactic", "there is no such key"),
        ("~compiler.tactic", "compiler.tactic", "there is no such key"),
        ("~compiler", "compiler", "cannot be left out; allowed: llm, rtx"),
        ("compiler._target_=os.system", "compiler._target_", "choose another option"),
        ("compiler={max_batch_size: 1}", "compiler", "choose one of llm, rtx"),
        ("hydra.run.dir=/x", "hydra.run.dir", "Hydra itself is not configured here"),
        ("compiler@other=rtx", "compiler@other", "Could not override"),
        ("compiler.max_batch_size=${nowhere}", "compiler.max_batch_size", "'nowhere' not found"),
    ],
)
def test_bad_override_is_one_fault_with_its_path(
    job: Callable[..., Job], override: str, path: str, message: str
) -> None:
    (fault,) = job("smol", override).faults
    assert fault.path == path
    assert message in fault.message


@pytest.mark.parametrize("text", ["compiler", "phi3", "compiler.x=[", "a b=3", "=3"])
def test_unreadable_override_says_how_to_write_it(run: Loader, text: str) -> None:
    (fault,) = run("smol", text).faults
    assert repr(text) in fault.message
    assert "key=value" in fault.message


def test_field_that_the_yaml_does_not_list_can_be_set(job: Callable[..., Job]) -> None:
    for override in ("compiler.kv_cache_dtype=bf16", "+compiler.kv_cache_dtype=bf16"):
        assert job("smol", override).value.compiler.kv_cache_dtype == "bf16"


def test_item_of_a_list_can_be_set(job: Callable[..., Job]) -> None:
    assert job("smol", "compiler.workloads.1.batch=3").value.compiler.workloads[1].batch == 3


def test_last_value_of_a_repeated_key_counts(job: Callable[..., Job]) -> None:
    built = job("smol", "compiler=rtx", "compiler.max_batch_size=1", "compiler=llm")
    assert built.value.compiler.max_seq_len == 4096


def test_interpolation_is_resolved_before_types_are_checked(job: Callable[..., Job]) -> None:
    built = job("smol", "compiler.max_seq_len=${compiler.max_batch_size}")
    assert built.config["compiler"]["max_seq_len"] == 8


@pytest.mark.parametrize("override", ["source=local", "source.repo=me/tuned"])
def test_other_weights_need_another_name(job: Callable[..., Job], override: str) -> None:
    (fault,) = job("smol", override).faults
    assert "name=NAME" in fault.message
    assert "'smol'" in fault.message
    assert job("smol", override, "name=mine").value.name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: [build, {override compiler: rtxx}]\nname: bad", "did you mean rtx?"),
        ("defaults: [build\nname: bad", "recipe bad cannot be read"),
        ("name: bad", "does not start from `build`"),
        ("defaults: [build]\nname: bad\n_target_: os.system", "is not a dataclass"),
        ("defaults: [build]\nname: bad\n_target_: pathlib.Path", "is not a dataclass"),
        ("- a\n- b", "recipe bad cannot be read"),
        ("42", "recipe bad cannot be read"),
        ("defaults: [bad]", "it contains itself"),
        ("defaults: [build]\n3: x\nname: bad", "3: there is no such key"),
        ("defaults: [build]\nname: {_target_: no.such.Class}", "cannot load 'no.such.Class'"),
        ("defaults: [build]\nname: ${", "recipe bad cannot be read"),
    ],
)
def test_broken_recipe_is_explained(
    job: Callable[..., Job], write: Write, text: str, message: str
) -> None:
    write("recipes/bad.yaml", text)
    assert message in " ".join(str(fault) for fault in job("bad").faults)


def test_sweep_makes_one_job_per_combination(run: Loader) -> None:
    loaded = run("smol,phi3", "compiler.max_batch_size=1,2", "name=x", multirun=True)
    assert [(job.recipe, job.swept) for job in loaded.jobs] == [
        (recipe, (f"compiler.max_batch_size={size}",))
        for recipe in ("smol", "phi3")
        for size in (1, 2)
    ]
    assert [job.value.compiler.max_batch_size for job in loaded.jobs] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("override", "sizes"),
    [
        ("compiler.max_batch_size=range(1,4)", [1, 2, 3]),
        ("compiler.max_batch_size=choice(5,7)", [5, 7]),
        ("compiler=glob(*)", [64, 8]),
        ("compiler=glob(*,exclude=l*)", [8]),
    ],
)
def test_sweep_grammar_of_hydra(run: Loader, override: str, sizes: list[int]) -> None:
    loaded = run("smol", override, multirun=True)
    assert loaded.faults == ()
    assert [job.value.compiler.max_batch_size for job in loaded.jobs] == sizes


def test_bad_job_leaves_the_others_good(run: Loader) -> None:
    jobs = run("smol,nosuch", "compiler.max_batch_size=0,2", multirun=True).jobs
    assert [bool(job.faults) for job in jobs] == [True, False, True, True]


@pytest.mark.parametrize("arguments", [("smol,phi3",), ("smol", "compiler=rtx,llm")])
def test_sweep_without_m_says_to_add_it(run: Loader, arguments: tuple[str, ...]) -> None:
    (fault,) = run(*arguments).faults
    assert "add -m" in fault.message


@pytest.mark.parametrize("override", ["compiler.max_batch_size=interval(1,2)", "compiler=glob(q*)"])
def test_sweep_without_values_is_a_fault(run: Loader, override: str) -> None:
    assert len(run("smol", override, multirun=True).faults) == 1


def test_users_own_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, here = tmp_path / "it's mine", tmp_path / "here" / "recipes"
    for folder in (own, here):
        folder.mkdir(parents=True)
        (folder / "same.yaml").write_text("name: same")
    monkeypatch.chdir(here.parent)
    found = config_folders(own)
    assert found.recipe_dir("same") == own
    assert found.recipes == (own, here, data_dir("recipes"))
    assert config_folders(None).recipe_dir("same") == here


def test_folder_with_quotes_and_spaces_is_searched(
    tmp_path: Path, folders: ConfigFolders, write: Write
) -> None:
    own = tmp_path / "it's, a [folder]"
    own.mkdir()
    (own / "mine.yaml").write_text("defaults: [smol, _self_]\nname: mine\n")
    (tmp_path / "recipes").rename(tmp_path / "it's, b=c")
    both = ConfigFolders(recipes=(own, tmp_path / "it's, b=c"), conf=folders.conf)
    (built,) = load("mine", [], folders=both).jobs
    assert built.value.source.repo == "org/smol"


def test_installed_package_brings_its_own_recipes(tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    code = Path(pipeline.__file__).parent
    shutil.copytree(code, site / "pipeline", ignore=shutil.ignore_patterns("__pycache__", "_data"))
    for folder in ("pipeline/_data/conf", "pipeline/_data/recipes", "recipes", "conf"):
        (site / folder).mkdir(parents=True)
    (site / "pipeline/_data/recipes/inside.yaml").touch()
    (site / "recipes/of-another-package.yaml").touch()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "plan", "nosuch"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "allowed: inside\n" in done.stderr


def test_missing_config_dir_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a folder"):
        config_folders(tmp_path / "nowhere")


def test_nothing_is_known_of_values_that_are_not_there(job: Callable[..., Any]) -> None:
    assert job("smol", "compiler.max_batch_size=null").faults[0].message == (
        "got null, wanted a whole number"
    )
