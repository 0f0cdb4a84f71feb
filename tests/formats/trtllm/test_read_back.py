"""An engine that is not what was asked for is refused, with both values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import PipelineError
from pipeline.formats.trtllm.build_tool import expected_config, read_back
from tests.formats.trtllm.settings import compiler

CHECKPOINT: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rotary_base": 500000.0,
    "rotary_scaling": {"type": "llama3", "factor": 8.0},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
}


def wanted(**fields: Any) -> dict[str, Any]:
    built = compiler(**fields)
    return expected_config(built.limits, built.opt_num_tokens, built.plugins, CHECKPOINT)


def config_for(**fields: Any) -> dict[str, Any]:
    """What the real program would write for it."""
    asked = compiler(**fields)
    return {
        "version": "1.2.1",
        "pretrained_config": json.loads(json.dumps({**CHECKPOINT, "logits_dtype": "float32"})),
        "build_config": {
            **asked.limits.to_json(),
            "max_beam_width": 1,
            "kv_cache_type": "PAGED",
            "strongly_typed": True,
            "input_timing_cache": None,
            "output_timing_cache": "/home/me/cache/model.cache",
            "plugin_config": dict(asked.plugins.effective(asked.limits.kv_cache_dtype)),
        },
    }


def write_engine(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "rank0.engine").write_bytes(b"ftrt")
    return folder


def put(config: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node = config
    for part in parents:
        node = node[part]
    if value is ...:
        del node[last]
    else:
        node[last] = value


def test_engine_as_asked_gives_its_effective_values(tmp_path: Path) -> None:
    folder = write_engine(tmp_path, config_for())
    effective = read_back(folder, wanted())
    assert "/home/me" not in (folder / "config.json").read_text()
    assert effective["build_config.max_num_tokens"] == 256
    assert effective["build_config.plugin_config.use_fp8_context_fmha"] is True
    assert effective["pretrained_config.quantization.kv_cache_quant_algo"] == "FP8"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("version", "1.2.0"),
        ("pretrained_config.dtype", "float16"),
        ("pretrained_config.rotary_base", ...),
        ("pretrained_config.rotary_scaling", None),
        ("pretrained_config.quantization.quant_algo", None),
        ("pretrained_config.quantization.kv_cache_quant_algo", None),
        ("build_config.max_batch_size", 3),
        ("build_config.max_beam_width", 2),
        ("build_config.kv_cache_type", "CONTINUOUS"),
        ("build_config.strongly_typed", False),
        ("build_config.plugin_config.gemm_plugin", "fp8"),
        ("build_config.plugin_config.use_fused_mlp", 1),
        ("build_config.plugin_config", ...),
    ],
)
def test_other_value_is_refused_with_both(tmp_path: Path, path: str, value: Any) -> None:
    config = config_for()
    put(config, path, value)
    with pytest.raises(PipelineError) as caught:
        read_back(write_engine(tmp_path, config), wanted())
    got = "missing" if value is ... else json.dumps(value)
    line = next(line for line in str(caught.value).splitlines() if path in line)
    assert line.endswith(f"got {got}")
    assert "asked" in line


def test_16_bit_cache_must_not_come_out_as_fp8(tmp_path: Path) -> None:
    asked = wanted(kv_cache_dtype="bfloat16")
    config = config_for(kv_cache_dtype="bfloat16")
    with pytest.raises(PipelineError, match='kv_cache_quant_algo: asked null, got "FP8"'):
        read_back(write_engine(tmp_path, config), asked)
    put(config, "pretrained_config.quantization.kv_cache_quant_algo", None)
    assert read_back(write_engine(tmp_path, config), asked)


def test_numbers_and_enums_are_equal_however_they_are_written(tmp_path: Path) -> None:
    config = config_for()
    put(config, "pretrained_config.rotary_base", 500000)
    put(config, "build_config.kv_cache_type", "paged")
    assert read_back(write_engine(tmp_path, config), wanted())


@pytest.mark.parametrize("content", [None, b""])
def test_missing_or_empty_engine_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    folder = write_engine(tmp_path, config_for())
    (folder / "rank0.engine").unlink()
    if content is not None:
        (folder / "rank0.engine").write_bytes(content)
    with pytest.raises(PipelineError, match=r"wrote no rank0\.engine"):
        read_back(folder, wanted())
