"""`trtllm-build`: its settings and command against the list of options, its log, what it wrote."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import PipelineError
from pipeline.formats.trtllm.build_tool import CAUSES, expected_config, explain, read_back
from tests.formats.trtllm.fake_trtllm_build import parse
from tests.formats.trtllm.fakes import compiler
from tests.quant.tiny_quantized import ADA

VARIANTS = {
    "fp8-cache": compiler(),
    "16-bit-cache": compiler(kv_cache_dtype="bfloat16"),
    "one-profile": compiler({"multiple_profiles": False}, opt_num_tokens=64),
    "every-switch-off": compiler(
        {
            "gemm_plugin": "auto",
            "use_fused_mlp": False,
            "use_paged_context_fmha": False,
            "multiple_profiles": False,
        }
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_flag_and_value_is_one_that_release_1_2_takes(name: str) -> None:
    command = VARIANTS[name].command
    parse(list(command[1:]))  # ends the program otherwise, as argparse does
    silencing = {"--max_input_len", "--build_config", "--kv_cache_type"}
    assert not silencing & set(command)


SNIPPETS = {
    # TensorRT-LLM issue 1677
    "RuntimeError: Required but not provided tensors:{'transformer.layers.61.attention.qkv.per_"
    "channel_scale'}": "lacks tensors",
    # parameter.py and modeling_utils.py
    "RuntimeError: Encounter error 'The value updated is not the same shape as the original. "
    "Updated: (64, 32), original: (64, 64)' for parameter 'transformer.layers.0.mlp.fc.weight'": (
        "transformer.layers.0.mlp.fc.weight of the TensorRT-LLM checkpoint has another shape"
    ),
    # commands/build.py
    "AssertionError: Unsupported model architecture: Gemma4ForCausalLM": (
        "does not know Gemma4ForCausalLM; use compiler=checkpoint"
    ),
    # TensorRT-LLM issue 346
    "[TRT] [E] 2: [virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: OutOfMemory (no "
    "further information)": "lower compiler.max_num_tokens",
    # PyTorch
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.": "nvidia-smi lists",
    "RuntimeError: No CUDA GPUs are available": "it saw no GPU",
    "CUDA error: CUDA driver version is insufficient for CUDA runtime version": "driver is too old",
    "OSError: [Errno 28] No space left on device": "ENGINESMITH_CACHE",
    # argparse
    "trtllm-build: error: unrecognized arguments: --multiple_profiles": "another release",
}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "compile.log"


@pytest.mark.parametrize("line", SNIPPETS)
def test_known_cause_says_what_to_change(line: str, log: Path) -> None:
    log.write_text(f"[TRT-LLM] [I] Build TensorRT engine\n{line}\nmore output\n")
    assert SNIPPETS[line] in explain(log, 1)


def test_every_cause_has_a_snippet() -> None:
    for pattern in CAUSES:
        assert any(re.search(pattern, line) for line in SNIPPETS), pattern


def test_skipped_kernel_and_unknown_failure_are_no_cause(log: Path) -> None:
    """Builds that end well print this (TensorRT-LLM issues 493 and 436)."""
    log.write_text(
        "[TRT] [W] Tactic Device request: 66048MB Available: 32510MB. Device memory is insufficient"
        " to use tactic.\n[TRT] [W] UNSUPPORTED_STATESkipping tactic 4 due to insufficient memory "
        "on requested size of 66048 detected for tactic 0x000000000000001f.\n"
        "[TRT] [W] Requested amount of GPU memory (33555480576 bytes) could not be allocated.\n"
        "Traceback\nKeyError: 'x'\n"
    )
    assert explain(log, 1) == ""


@pytest.mark.parametrize("returncode", [-9, 137])
def test_killed_process_points_to_host_memory(returncode: int, log: Path) -> None:
    log.write_text("loading\n")
    assert "compiler.memory_gib" in explain(log, returncode)


def test_cause_is_found_at_the_end_of_a_long_log(log: Path) -> None:
    log.write_bytes(b"\xff progress\n" * 200_000 + b"CUDA out of memory\n")
    assert "ran out of memory" in explain(log, 1)


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
        ("pretrained_config.dtype", "float16"),
        ("pretrained_config.rotary_base", ...),
        ("pretrained_config.quantization.kv_cache_quant_algo", None),
        ("build_config.max_batch_size", 3),
        ("build_config.kv_cache_type", "CONTINUOUS"),
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


def test_limits_name_the_type_that_the_cache_has() -> None:
    assert compiler().limits.kv_cache_dtype == "fp8"
    assert compiler(kv_cache_dtype="bfloat16").limits.kv_cache_dtype == "bfloat16"
    half = compiler(kv_cache_dtype="bfloat16", dtype="float16")
    assert half.limits.kv_cache_dtype == "float16"


@pytest.mark.parametrize(
    ("plugins", "fields", "message"),
    [
        ({}, {"max_num_tokens": 31}, r"\(31\) must be >= plugins.tokens_per_block \(32\)"),
        ({}, {"kv_cache_dtype": "float16"}, r"kv_cache_dtype \(float16\) must be fp8 or dtype"),
        ({}, {"opt_num_tokens": 8}, r"opt_num_tokens \(8\) does not go with plugins.multiple"),
        (
            {"multiple_profiles": False},
            {"opt_num_tokens": 257},
            r"opt_num_tokens \(257\) must be <= max_num_tokens \(256\)",
        ),
    ],
)
def test_what_does_not_go_together_is_a_recipe_fault(
    plugins: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compiler(plugins, **fields)


@pytest.mark.parametrize(("asked", "built"), [(32, 32), (512, 512), (513, 512)])
def test_an_iteration_takes_no_more_tokens_than_all_requests_have(asked: int, built: int) -> None:
    made = compiler(max_num_tokens=asked)
    assert made.limits.max_num_tokens == built
    assert f"--max_num_tokens={built}" in " ".join(made.command).replace("tokens ", "tokens=")


def test_what_shapes_the_bytes_changes_the_key() -> None:
    """Where the build runs, and for how long, does not."""
    known = compiler().inputs(ADA)
    assert compiler(max_batch_size=5).inputs(ADA) != known
    assert compiler({"use_fused_mlp": False}).inputs(ADA) != known
    assert compiler(kv_cache_dtype="bfloat16").inputs(ADA) != known
    assert compiler(dtype="float16").inputs(ADA) != known
    assert compiler().inputs(dataclasses.replace(ADA, card="NVIDIA-L4")) != known
    assert compiler(where="local", timeout_s=1.0, memory_gib=2.0).inputs(ADA) == known
