"""The stage: made once, and made again when something that shapes it changes."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.cache import StageCache
from pipeline.formats.trtllm.convert import (
    TrtLlmSettings,
    convert_trtllm,
)
from tests.formats.trtllm.convert.checkpoints import FP8_CACHE


def test_key_follows_checkpoint_and_settings(llama: Path, tmp_path: Path) -> None:
    cache = StageCache(root=tmp_path)
    keys = {
        convert_trtllm(llama, digest, settings, cache).key
        for digest, settings in (
            ("a" * 64, FP8_CACHE),
            ("b" * 64, FP8_CACHE),
            ("a" * 64, TrtLlmSettings(kv_cache_dtype="bfloat16", dtype="bfloat16")),
            ("a" * 64, TrtLlmSettings(kv_cache_dtype="fp8", dtype="float16")),
        )
    }
    assert len(keys) == 4


def test_two_conversions_are_equal_to_the_byte(llama: Path, tmp_path: Path) -> None:
    one, two = (
        convert_trtllm(llama, "a" * 64, FP8_CACHE, StageCache(root=tmp_path / name))
        for name in ("one", "two")
    )
    assert one.digest == two.digest
