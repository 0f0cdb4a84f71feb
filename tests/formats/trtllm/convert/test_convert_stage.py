"""The stage: made once, and made again when something that shapes it changes."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.cache import StageCache
from pipeline.formats.trtllm.convert import convert_trtllm


def test_key_follows_checkpoint_and_types_and_the_bytes_follow_the_key(
    llama: Path, tmp_path: Path
) -> None:
    one, other = StageCache(root=tmp_path / "one"), StageCache(root=tmp_path / "other")
    made = [
        convert_trtllm(llama, "a" * 64, one, dtype="bfloat16", kv_fp8=True),
        convert_trtllm(llama, "b" * 64, one, dtype="bfloat16", kv_fp8=True),
        convert_trtllm(llama, "a" * 64, one, dtype="bfloat16", kv_fp8=False),
        convert_trtllm(llama, "a" * 64, one, dtype="float16", kv_fp8=True),
    ]
    assert len({result.key for result in made}) == 4
    again = convert_trtllm(llama, "a" * 64, other, dtype="bfloat16", kv_fp8=True)
    assert (again.key, again.digest) == (made[0].key, made[0].digest)
