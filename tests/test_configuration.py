"""Recipes and overrides -> jobs with typed recipes, or with every fault at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.compose import ConfigFolders, config_folders
from pipeline.config.load import Job, load, registry_overrides
from pipeline.core.settings import data_dir

OWN = """\
defaults: [build, {shapes@shape: smollm2}, _self_]
name: own
version: 1.0.0
source: {repo_id: org/own, revision: abc, licence: MIT}
"""

Write = Callable[[str, str], None]
Only = Callable[..., Job]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


@pytest.fixture
def folders(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> ConfigFolders:
    monkeypatch.chdir(tmp_path)
    write("own.yaml", OWN.replace("abc", "a" * 40))
    return ConfigFolders(recipes=(tmp_path, data_dir("recipes")), conf=data_dir("conf"))


@pytest.fixture
def only(folders: ConfigFolders) -> Only:
    return lambda recipe, *overrides: load(recipe, overrides, folders=folders)


def messages(job: Job) -> dict[str, str]:
    return {fault.path: fault.message for fault in job.faults}


def compiler_of(job: Job) -> Any:
    return job.value.compiler


def test_recipe_becomes_typed_objects(only: Only) -> None:
    job = only("own", "compiler.max_batch_size=16", "registry.path=/x y/z")
    assert job.faults == ()
    assert job.value.name == "own"
    assert compiler_of(job).max_batch_size == 16
    assert job.config["source"]["kind"] == "hub"
    assert job.config["registry"] == {"kind": "folder", "path": "/x y/z"}


def test_every_fault_of_the_command_line_is_reported_together(only: Only) -> None:
    found = messages(
        only("own", "compiler.max_batch_sise=8", "compiler.max_seq_len=long", "version=_1",
             "compiler.max_batch_size=0", "name=My_Model", "runner=nosuch")
    )  # fmt: skip
    assert set(found) == {
        "compiler.max_batch_sise",
        "compiler.max_seq_len",
        "compiler.max_batch_size",
        "version",
        "name",
        "runner",
    }
    assert "did you mean compiler.max_batch_size?" in found["compiler.max_batch_sise"]
    assert found["compiler.max_seq_len"] == 'got "long", must be a valid integer'
    assert found["compiler.max_batch_size"] == "got 0, must be greater than 0"
    assert "did you mean my-model?" in found["name"]
    assert "'nosuch'" in found["runner"]


def test_faults_of_a_file_name_its_line(only: Only, write: Write) -> None:
    write(
        "bad.yaml",
        "defaults: [own, {override compiler: trtllm}, _self_]\n"
        "nam: bad\n"
        "source: {repo_id: 3}\n"
        "acceptance:\n"
        "  targets:\n"
        "    - {name: a, batch: 1, isl: 1, osl: 1}\n"
        "    - {name: b, batch: 0, isl: fast, osl: 1}\n"
        "compiler:\n"
        "  plugins: {gemm_plugin: fp9}\n",
    )
    assert [str(fault) for fault in only("bad").faults] == [
        "source.repo_id: got 3, must be a valid string (bad.yaml:3)",
        "compiler.plugins.gemm_plugin: got \"fp9\", must be 'disable', 'auto', 'float16', "
        "'bfloat16' or 'fp8' (bad.yaml:9)",
        "acceptance.targets.1.batch: got 0, must be greater than 0 (bad.yaml:7)",
        'acceptance.targets.1.isl: got "fast", must be a valid integer (bad.yaml:7)',
        "nam: there is no such key; did you mean name? allowed: acceptance, calibration, compiler, "
        "name, quantizer, registry, runner, shape, source, target, version (bad.yaml:2)",
    ]


def test_fault_of_an_option_or_a_parent_recipe_names_that_file(only: Only, write: Write) -> None:
    write("compiler/mine.yaml", "defaults: [trtrtx]\nmax_seq_len: -1\n")
    write("parent.yaml", OWN.replace("abc", "main"))
    write("child.yaml", "defaults: [parent, {override compiler: mine}, _self_]\n")
    where = {fault.path: fault.where for fault in only("child", "runner=onnxruntime").faults}
    assert where == {"source": "parent.yaml:4", "compiler.max_seq_len": "compiler/mine.yaml:2"}


def test_missing_values_are_reported_once_and_hide_no_other_fault(only: Only, write: Write) -> None:
    write(
        "bad.yaml", "defaults: [build, _self_]\nname: bad\nsource: {licence: 3, notice: '${x}'}\n"
    )
    found = messages(only("bad"))
    assert found.pop("source.notice").startswith("cannot be resolved")
    assert found.pop("source.licence") == "got 3, must be a valid string"
    assert found == {
        path: f"is required; set {path}=VALUE or put it in the recipe"
        for path in ("version", "shape", "source.repo_id", "source.revision")
    }


def test_unknown_recipe_names_those_that_there_are(only: Only) -> None:
    (fault,) = only("smollm3", "compiler.max_batch_size=0").faults
    assert "did you mean smollm2? allowed: " in fault.message


@pytest.mark.parametrize(
    ("override", "path", "message"),
    [
        ("compiler=trtrtx,trtllm", "compiler", "names several values, and a run builds one"),
        ("max_seq_len=8", "max_seq_len", "did you mean compiler.max_seq_len?"),
        ("compiler.max_seq_len.x=8", "compiler.max_seq_len", "must be a valid integer"),
        ("acceptance.targets.5.batch=8", "acceptance.targets.5.batch", "out of range"),
        ("~compiler.tactic", "compiler.tactic", "Could not delete"),
        ("compiler.kind=trtllm", "compiler.kind", "choose another option, compiler=OPTION"),
        ("compiler._target_=os.system", "compiler._target_", "there is no such key"),
        ("hydra.run.dir=/x", "hydra.run.dir", "Hydra itself is not configured here"),
        ("compiler.max_seq_len=${nowhere}", "compiler.max_seq_len", "'nowhere' not found"),
        ("acceptance.sample_prompt=${oc.env:HOME}", "acceptance.sample_prompt", "holds data only"),
    ],
)
def test_bad_override_is_one_fault_with_its_path(
    only: Only, override: str, path: str, message: str
) -> None:
    (fault,) = only("smollm2", override).faults
    assert fault.path == path
    assert message in fault.message
    assert fault.where == "", "the command line set it"


@pytest.mark.parametrize("text", ["compiler", "phi3", "compiler.x=[", "a b=3", "=3"])
def test_unreadable_override_says_how_to_write_it(only: Only, text: str) -> None:
    (fault,) = only("own", text).faults
    assert repr(text) in fault.message
    assert "key=value" in fault.message


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_field_that_the_yaml_does_not_list_can_be_set(only: Only, plus: str) -> None:
    job = only("own", f"{plus}acceptance.max_spread=0.25")
    assert job.faults == ()
    assert job.value.acceptance.max_spread == 0.25


@pytest.mark.parametrize("override", ["source.repo_id=me/tuned", "source.revision=" + "b" * 40])
def test_other_weights_need_another_name(only: Only, override: str) -> None:
    (fault,) = only("own", override).faults
    assert "name=NAME" in fault.message
    assert "'own'" in fault.message
    assert only("own", override, "name=mine").value.name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: [own]\nsource: {kind: os}", 'source.kind: got "os", must be one of embedded'),
        ("defaults: [own]\nsource: {kind: ../hub}", 'source.kind: got "../hub"'),
        ("- a\n- b", "recipe bad cannot be read"),
        ("defaults: [bad]", "it contains itself"),
        ("defaults: [own]\nname: '${${version}:b}'", "name: a recipe holds data only"),
        ("defaults: [own]\ncompiler: {max_seq_len: .nan}", "compiler.max_seq_len"),
    ],
)
def test_broken_recipe_is_explained(only: Only, write: Write, text: str, message: str) -> None:
    write("bad.yaml", text)
    assert message in " ".join(str(fault) for fault in only("bad").faults)


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


@pytest.mark.parametrize("compiler", ["trtllm", "trtrtx"])
def test_smaller_batch_alone_is_enough_and_other_sizes_follow(
    only: Only, compiler: str, caplog: pytest.LogCaptureFixture
) -> None:
    from pipeline.build import plan_of

    job = only("phi3", f"compiler={compiler}", "compiler.max_batch_size=1")
    assert job.faults == ()
    limits = job.value.compiler.limits
    assert limits.max_batch_size == 1
    assert limits.max_num_tokens >= 1
    assert plan_of(job.value).faults == ()
    assert "Left out, since the batch is 1 at most: gpu-b4, gpu-b64" in caplog.text
    assert job.config["acceptance"]["targets"] == []


def test_targets_that_the_command_line_sets_are_not_left_out(only: Only) -> None:
    target = "acceptance.targets=[{name: t, batch: 4, isl: 8, osl: 8}]"
    job = only("phi3", "compiler.max_batch_size=1", target)
    assert [load.name for load in job.value.acceptance.targets] == ["t"]


@pytest.mark.parametrize(
    ("url", "kind", "where"),
    [
        ("it's/here", "folder", ("path", "it's/here")),
        ("file:///srv/x", "folder", ("path", "/srv/x")),
        ("s3://bucket/prefix", "s3", ("url", "s3://bucket/prefix")),
        ("oci://host/x", "oci", ("url", "oci://host/x")),
    ],
)
def test_registry_option_of_a_build_is_the_recipes_registry(
    only: Only, url: str, kind: str, where: tuple[str, object]
) -> None:
    job = only("smollm2", *registry_overrides(url))
    assert job.faults == ()
    assert job.config["registry"] == dict([("kind", kind), where])


SIZES = {
    "checkpoint": "max_batch_size: 7\nmax_seq_len: 700\nkv_cache_dtype: bfloat16\n",
    "trtrtx": "max_batch_size: 9\nopt_batch_size: 3\nmax_seq_len: 900\n",
}


@pytest.fixture
def sized(write: Write, only: Only) -> Callable[..., Job]:
    """A recipe with sizes of its own: `- optional sizes/NAME@compiler: ${compiler}`."""
    write(
        "own.1.yaml",
        "defaults: [build, {shapes@shape: smollm2}, {optional sizes/own.1@compiler: '${compiler}'},"
        " {override source: embedded}, {override compiler: checkpoint}, _self_]\n"
        "name: own.1\nversion: 1.0.0\n",
    )
    for compiler, text in SIZES.items():
        write(f"sizes/own.1/{compiler}.yaml", text)
    return lambda *overrides: only("own.1", *overrides)


def test_each_compiler_gets_its_own_sizes_runner_and_the_rest_of_its_option(
    sized: Callable[..., Job],
) -> None:
    job = sized()
    assert (job.value.compiler.format, compiler_of(job).max_seq_len) == ("checkpoint", 700)
    assert (compiler_of(job).kv_cache_dtype, compiler_of(job).runtime) == ("bfloat16", "vllm")
    assert job.value.runner.name == "transformers"
    other = sized("compiler=trtrtx")
    assert (other.value.compiler.format, compiler_of(other).opt_batch_size) == ("trtrtx", 3)
    assert compiler_of(other).activation_dtype == "bfloat16"
    assert other.value.runner.name == "onnxruntime"
    assert sized("runner=onnxruntime").value.runner.name == "onnxruntime"
    assert compiler_of(sized("compiler.max_batch_size=16")).max_batch_size == 16


def test_compiler_without_sizes_keeps_those_of_its_option(
    sized: Callable[..., Job], write: Write, tmp_path: Path
) -> None:
    (tmp_path / "sizes/own.1/trtrtx.yaml").unlink()
    assert compiler_of(sized("compiler=trtrtx")).max_seq_len == 1024
    option = (data_dir("conf") / "compiler" / "trtrtx.yaml").read_text()
    write("compiler/mine.yaml", option.replace("1024", "900"))
    assert compiler_of(sized("compiler=mine")).max_seq_len == 900
