"""A recipe's own sizes for each compiler: `- optional sizes/NAME@compiler: ${compiler}`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.folders import ConfigFolders, config_folders
from pipeline.config.load import Job, load
from pipeline.core.data import data_dir

RECIPE = """\
defaults:
  - build
  - shapes@shape: smollm2
  - optional sizes/own.1@compiler: ${compiler}
  - override source: embedded
  - override compiler: checkpoint
  - _self_
name: own.1
version: 1.0.0
"""
SIZES = {
    "checkpoint": "max_batch_size: 7\nmax_seq_len: 700\nkv_cache_dtype: bfloat16\n",
    "trtrtx": "max_batch_size: 9\nopt_batch_size: 3\nmax_seq_len: 900\n",
}


@pytest.fixture
def folders(tmp_path: Path) -> ConfigFolders:
    (tmp_path / "own.1.yaml").write_text(RECIPE)
    (tmp_path / "sizes" / "own.1").mkdir(parents=True)
    for compiler, text in SIZES.items():
        (tmp_path / "sizes" / "own.1" / f"{compiler}.yaml").write_text(text)
    return ConfigFolders(recipes=(tmp_path, data_dir("recipes")), conf=data_dir("conf"))


def compiler_of(job: Job) -> Any:
    return job.value.compiler


def only(folders: ConfigFolders, *overrides: str, recipe: str = "own.1") -> Job:
    return load(recipe, overrides, folders=folders)


def test_each_compiler_gets_its_own_sizes_and_keeps_the_rest_of_its_option(
    folders: ConfigFolders,
) -> None:
    job = only(folders)
    assert job.faults == ()
    assert (job.value.compiler.format, compiler_of(job).max_seq_len) == ("checkpoint", 700)
    assert compiler_of(job).kv_cache_dtype == "bfloat16"
    assert compiler_of(job).runtime == "vllm"

    other = only(folders, "compiler=trtrtx")
    assert other.faults == ()
    assert (other.value.compiler.format, compiler_of(other).opt_batch_size) == ("trtrtx", 3)
    assert compiler_of(other).activation_dtype == "bfloat16"


@pytest.mark.parametrize("compiler", ["checkpoint", "trtrtx"])
def test_command_line_wins_over_the_sizes(folders: ConfigFolders, compiler: str) -> None:
    job = only(folders, "compiler.max_batch_size=16", f"compiler={compiler}")
    assert job.faults == ()
    assert compiler_of(job).max_batch_size == 16


def test_compiler_without_sizes_keeps_those_of_its_option(folders: ConfigFolders) -> None:
    (folders.recipes[0] / "sizes" / "own.1" / "trtrtx.yaml").unlink()
    job = only(folders, "compiler=trtrtx")
    assert job.faults == ()
    assert compiler_of(job).max_seq_len == 1024


def test_runner_follows_the_compiler_unless_it_is_chosen(folders: ConfigFolders) -> None:
    assert only(folders).value.runner.name == "transformers"
    assert only(folders, "compiler=trtrtx").value.runner.name == "onnxruntime"
    assert only(folders, "runner=onnxruntime").value.runner.name == "onnxruntime"


def test_compiler_option_of_a_users_own_is_one_file(folders: ConfigFolders) -> None:
    own = folders.recipes[0]
    (own / "compiler").mkdir()
    option = (folders.conf / "compiler" / "trtrtx.yaml").read_text()
    (own / "compiler" / "mine.yaml").write_text(option.replace("1024", "900"))
    job = only(folders, "compiler=mine")
    assert job.faults == ()
    assert compiler_of(job).max_seq_len == 900
    assert job.value.runner.name == "onnxruntime"


def test_acknowledging_a_licence_does_not_ask_for_another_name() -> None:
    licence = "source.acknowledge_licence=LicenseRef-Llama-3.1-Community"
    job = only(config_folders(None), licence, "compiler=checkpoint", recipe="llama3.1")
    assert job.faults == ()
    assert job.value.source.terms.acknowledged == job.config["source"]["licence"]
