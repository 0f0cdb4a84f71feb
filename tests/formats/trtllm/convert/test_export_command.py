"""`enginesmith export-trtllm`: the folder, the refusals, the printed command."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pipeline import cli
from pipeline.core.errors import (
    ConflictError,
    CorruptError,
    ExitCode,
    NotFoundError,
    PipelineError,
    RecipeError,
)
from pipeline.formats.trtllm.export import export_trtllm
from tests.formats.trtllm.convert.checkpoints import edited, modelopt_checkpoint, reconfigured
from tests.formats.trtllm.convert.conftest import Convert


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["export-trtllm", *map(str, arguments)])


def flags(line: str) -> dict[str, str]:
    words = shlex.split(line)
    assert words[0] == "trtllm-build"
    return dict(zip(words[1::2], words[2::2], strict=True))


def test_folder_is_complete_and_the_command_can_be_pasted(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "a b" / "out"
    result = invoke(llama, out)
    assert result.exit_code == ExitCode.OK, result.output
    (line,) = result.stdout.splitlines()
    found = flags(line)
    assert found["--checkpoint_dir"] == str(out)
    assert found["--output_dir"] == f"{out}-engine"
    assert found["--max_batch_size"] == "64"
    assert found["--max_seq_len"] == "256"
    assert found["--max_num_tokens"] == "8192"
    assert found["--use_fp8_context_fmha"] == "disable"  # our checkpoints declare a 16-bit cache
    names = {path.name for path in out.iterdir()}
    assert names - {"special_tokens_map.json"} == {  # Transformers 4 writes that file too
        "config.json",
        "rank0.safetensors",
        "conversion.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
    }
    assert json.loads((out / "config.json").read_text())["quantization"] == {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head"],
    }
    assert "enginesmith" not in result.stdout


def test_fp8_cache_can_be_asked_for(llama: Path, tmp_path: Path) -> None:
    result = invoke(llama, tmp_path / "out", "--kv-cache-dtype", "fp8", "--max-batch-size", "4")
    assert result.exit_code == ExitCode.OK, result.output
    found = flags(result.stdout)
    assert found["--use_fp8_context_fmha"] == "enable"
    assert found["--max_num_tokens"] == str(4 * 256)  # more could never be scheduled
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["kv_cache_dtype"] == "fp8"


@pytest.mark.parametrize(("kv_scales", "wanted"), [(True, "fp8"), (False, "bfloat16")])
def test_cache_of_a_foreign_checkpoint_is_the_declared_one(
    tmp_path: Path, kv_scales: bool, wanted: str
) -> None:
    foreign = modelopt_checkpoint(tmp_path, "mistral", kv_scales=kv_scales)
    assert export_trtllm(foreign, tmp_path / "out").kv_cache_dtype == wanted
    (foreign / "hf_quant_config.json").unlink()  # then config.json says it
    assert export_trtllm(foreign, tmp_path / "again").kv_cache_dtype == wanted


def test_second_rounding_and_window_are_told(tmp_path: Path) -> None:
    foreign = modelopt_checkpoint(tmp_path, "mistral-sliding", kv_scales=False)
    result = invoke(foreign, tmp_path / "out")
    assert result.exit_code == ExitCode.OK, result.output
    assert "9 linears were rounded a second time" in result.stderr
    assert "max_attention_window=[24]" in result.stderr
    assert flags(result.stdout)["--max_seq_len"] == "24"


def test_checkpoint_compilers_folder_with_untied_head_is_exported(
    converted: Convert, tmp_path: Path
) -> None:
    def untie(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    packed = edited(converted("llama3.2").unified, tmp_path / "packed", untie)
    untied = reconfigured(
        packed, tmp_path / "untied", lambda c: c.update(tie_word_embeddings=False)
    )
    export_trtllm(untied, tmp_path / "out")
    tied = converted("llama3.2").dir / "rank0.safetensors"
    assert "lm_head.weight" in tied.read_bytes()[:20000].decode("latin-1")


def refused(*arguments: Any, **settings: Any) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        export_trtllm(*arguments, **settings)
    return caught.value


def test_folder_that_is_not_empty_is_left_alone(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    error = refused(llama, tmp_path / "out")
    assert isinstance(error, ConflictError)
    assert error.exit_code == ExitCode.CONFLICT
    assert str(error) == f"{tmp_path / 'out'} exists and is not empty; name a new folder"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert isinstance(refused(llama, tmp_path / "out" / "mine"), ConflictError)


def test_empty_folder_is_filled(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_trtllm(llama, tmp_path / "out")
    assert (tmp_path / "out" / "rank0.safetensors").is_file()


def test_failed_export_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    broken = edited(llama, tmp_path / "broken", lambda tensors: tensors.pop("model.norm.weight"))
    error = refused(broken, tmp_path / "exports" / "out")
    assert isinstance(error, CorruptError)
    assert list((tmp_path / "exports").glob("*")) == []


def test_folder_without_checkpoint_is_not_found(tmp_path: Path) -> None:
    error = refused(tmp_path, tmp_path / "out")
    assert isinstance(error, NotFoundError)
    assert "holds no config.json" in str(error)
    assert isinstance(invoke(tmp_path, tmp_path / "out").exception, NotFoundError)


def test_fp8_cache_of_qwen_is_refused_by_the_known_bad_table(
    converted: Convert, tmp_path: Path
) -> None:
    error = refused(converted("qwen2.5").unified, tmp_path / "out", kv_cache_dtype="fp8")
    assert isinstance(error, RecipeError)
    assert "Qwen2 and Qwen2.5 give wrong text with an FP8 KV cache" in str(error)
    export_trtllm(converted("qwen2.5").unified, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"tp_size": 2}, "tp_size: is 2; the converter writes checkpoints for one GPU"),
        ({"pp_size": 2}, "pp_size: is 2; the converter writes checkpoints for one GPU"),
        ({"kv_cache_dtype": "float16"}, "beside dtype bfloat16 it is fp8 or bfloat16"),
    ],
)
def test_impossible_setting_is_refused(
    llama: Path, tmp_path: Path, settings: dict[str, Any], shown: str
) -> None:
    error = refused(llama, tmp_path / "out", **settings)
    assert isinstance(error, RecipeError)
    assert shown in str(error)
    assert not (tmp_path / "out").exists()


def test_unknown_cache_declaration_is_refused(llama: Path, tmp_path: Path) -> None:
    other = reconfigured(
        llama,
        tmp_path / "other",
        lambda c: c["quantization"].update(kv_cache_quant_algo="NVFP4"),
        "hf_quant_config.json",
    )
    error = refused(other, tmp_path / "out")
    assert isinstance(error, RecipeError)
    assert "kv_cache_quant_algo: is NVFP4" in str(error)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (("--max-num-tokens", "8"), "max_num_tokens: (8) must be >= max_batch_size (64)"),
        (("--max-seq-len", "512"), "max_seq_len: (512) is beyond the model's context (256)"),
    ],
)
def test_impossible_size_is_refused_before_anything_is_written(
    llama: Path, tmp_path: Path, options: tuple[str, str], shown: str
) -> None:
    error = invoke(llama, tmp_path / "out", *options).exception
    assert isinstance(error, RecipeError)
    assert shown in str(error)
    assert not (tmp_path / "out").exists()
