"""`enginesmith export-trtllm`: the folder, the refusals, the printed command."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pipeline import cli
from pipeline.core.errors import ConflictError, ExitCode, PipelineError
from pipeline.formats.trtllm.convert import plan_export
from pipeline.quant.unified import UnifiedCheckpoint
from tests.formats.trtllm.conftest import Convert
from tests.formats.trtllm.convert.checkpoints import modelopt_checkpoint
from tests.quant.tiny_quantized import edited


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.make_app(), ["export-trtllm", *map(str, arguments)])


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
    assert plan_export(foreign, tmp_path / "out").kv_cache_dtype == wanted
    (foreign / "hf_quant_config.json").unlink()  # then config.json says it
    assert plan_export(foreign, tmp_path / "out").kv_cache_dtype == wanted


def test_second_rounding_and_window_are_told(tmp_path: Path) -> None:
    foreign = modelopt_checkpoint(tmp_path, "mistral-sliding", kv_scales=False)
    result = invoke(foreign, tmp_path / "out")
    assert result.exit_code == ExitCode.OK, result.output
    assert "9 linears were rounded a second time" in result.stderr
    assert "max_attention_window=[24]" in result.stderr
    assert flags(result.stdout)["--max_seq_len"] == "24"


def refused(*arguments: str | Path) -> PipelineError:
    """The error of an export that is refused."""
    error = invoke(*arguments).exception
    assert isinstance(error, PipelineError), error
    return error


@pytest.mark.parametrize(
    ("out", "code"), [(".", 8), ("taken", 8), ("taken/mine", 8), ("taken/mine/below/out", 2)]
)
def test_folder_that_exists_is_refused_before_any_work_and_left_alone(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, code: int
) -> None:
    monkeypatch.setattr(UnifiedCheckpoint, "tensors", property(lambda self: pytest.fail("read")))
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("taken/mine").write_text("mine")
    error = refused(llama, out)
    assert error.exit_code == code
    assert "name a new folder" in str(error) or "which is a file" in str(error)
    assert f"such as {tmp_path}/taken/mine/" not in str(error), "below a file"
    assert [str(path) for path in sorted(Path().rglob("*"))] == ["taken", "taken/mine"]


def test_failed_export_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    broken = edited(llama, tmp_path / "broken", lambda tensors: tensors.pop("model.norm.weight"))
    assert refused(broken, tmp_path / "exports" / "out").exit_code == ExitCode.CORRUPT
    assert list((tmp_path / "exports").glob("*")) == []


def test_folder_that_was_filled_meanwhile_is_a_conflict(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export = plan_export(llama, out)
    out.mkdir()
    (out / "theirs").write_text("theirs")
    with pytest.raises(ConflictError, match="was filled meanwhile"):
        export.write()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["theirs"]


def test_fp8_cache_of_qwen_is_refused_by_the_known_bad_table(
    converted: Convert, tmp_path: Path
) -> None:
    unified = converted("qwen2.5").unified
    error = refused(unified, tmp_path / "out", "--kv-cache-dtype", "fp8")
    assert error.exit_code == ExitCode.USAGE
    assert "--kv-cache-dtype: Qwen2 and Qwen2.5 give wrong text with an FP8" in str(error)
    assert "compiler." not in str(error), "an override, which this command does not take"
    assert invoke(unified, tmp_path / "out").exit_code == ExitCode.OK


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (("--kv-cache-dtype", "float16"), "beside dtype bfloat16 it is fp8 or bfloat16"),
        (("--max-num-tokens", "8"), "max_num_tokens: (8) must be >= max_batch_size (64)"),
        (("--max-seq-len", "512"), "max_seq_len: (512) is beyond the model's context (256)"),
    ],
)
def test_impossible_setting_is_refused_before_anything_is_written(
    llama: Path, tmp_path: Path, options: tuple[str, str], shown: str
) -> None:
    error = refused(llama, tmp_path / "out", *options)
    assert error.exit_code == ExitCode.USAGE
    assert shown in str(error)
    assert not (tmp_path / "out").exists()


_DECLARATION, _CONFIG = "hf_quant_config.json", "config.json"


def declared(name: str, content: Any) -> Callable[[Path], object]:
    """Write a declaration: text as it is, anything else as the file's quantization section."""

    def write(folder: Path) -> None:
        path = folder / name
        if isinstance(content, str):
            path.write_text(content)
            return
        section = "quantization" if name == _DECLARATION else "quantization_config"
        (folder / _DECLARATION).unlink(missing_ok=name == _DECLARATION)
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**kept, section: content}))

    return write


@pytest.mark.parametrize(
    ("damage", "code", "shown"),
    [
        (declared(_DECLARATION, ""), 4, "not JSON"),
        (declared(_DECLARATION, {"quant_algo": 8}), 4, "quant_algo is 8, wanted a name"),
        (
            declared(_DECLARATION, {"quant_algo": "W4A16_AWQ"}),
            2,
            "declares W4A16_AWQ, which is not converted",
        ),
        (
            declared(_CONFIG, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
            2,
            "holds W4A16 linears and no FP8 linear",
        ),
    ],
)
def test_declaration_that_is_damaged_or_of_another_format_is_named(
    llama: Path, tmp_path: Path, damage: Callable[[Path], object], code: int, shown: str
) -> None:
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    damage(other)
    error = refused(other, tmp_path / "out")
    assert error.exit_code == code
    assert shown in str(error)
    assert "make the checkpoint again" not in str(error) or code == 4
    assert not (tmp_path / "out").exists()
