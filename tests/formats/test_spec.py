"""What every format and every precision states about itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.core.errors import IncompatibleError
from pipeline.core.settings import data_dir
from pipeline.core.values import Limits
from pipeline.formats.spec import format_spec, format_specs
from pipeline.quant.spec import KV_CACHE_DTYPES, quant_spec, quant_specs
from tests.quant.tiny_quantized import ADA

LIMITS = Limits(max_batch_size=64, max_seq_len=1024, max_num_tokens=8192, kv_cache_dtype="bfloat16")


def test_the_folders_are_the_lists() -> None:
    assert set(format_specs()) == {"checkpoint", "trtllm", "trtrtx"}
    assert set(quant_specs()) == {"bf16", "fp8", "w4a16"}
    for specs in (format_specs(), quant_specs()):
        assert all(spec.name == name for name, spec in specs.items())


@pytest.mark.parametrize(
    ("name", "kv_cache_dtype", "variant"),
    [
        ("trtllm", "fp8", "rtx4090-trtllm-fp8-b64-s1024-kv8"),
        ("trtllm", "float16", "rtx4090-trtllm-fp8-b64-s1024"),
        ("trtrtx", "bfloat16", "sm89-trtrtx-fp8-b64-s1024"),
        ("checkpoint", "fp8", "any-checkpoint-fp8-kv8"),
        ("checkpoint", "bfloat16", "any-checkpoint-fp8"),
    ],
)
def test_a_variant_names_what_the_engine_is_bound_to(
    name: str, kv_cache_dtype: str, variant: str
) -> None:
    card = replace(ADA, id="rtx4090")
    limits = replace(LIMITS, kv_cache_dtype=kv_cache_dtype)
    assert format_spec(name).variant(quant_spec("fp8"), limits, card) == variant


@pytest.mark.parametrize("name", format_specs())
def test_a_format_states_types_and_runners_that_exist(name: str) -> None:
    spec = format_spec(name)
    assert set(spec.kv_cache_dtypes) <= set(KV_CACHE_DTYPES)
    for runner in (spec.runner, spec.substitute):
        assert (data_dir("conf") / "runner" / f"{runner}.yaml").is_file()
    assert spec.holds(quant_spec("fp8"))


def test_an_unknown_format_is_named_with_the_known_ones() -> None:
    with pytest.raises(IncompatibleError, match="gguf is not known here, only checkpoint, trtllm"):
        format_spec("gguf")
