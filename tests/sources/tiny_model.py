"""A tiny model's files, and the ways in which they can be broken."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def with_header(header: Mapping[str, Any] | str, data: bytes) -> bytes:
    """A safetensors file of this header (JSON text as it is) and data."""
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def u8(begin: int, end: int) -> dict[str, Any]:
    """Header entry of a U8 vector."""
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


def safetensors(tensors: Mapping[str, int], fill: bytes = b"\x01") -> bytes:
    """A file of U8 vectors with the given lengths."""
    header, offset = {}, 0
    for name, length in tensors.items():
        header[name] = u8(offset, offset + length)
        offset += length
    return with_header(header, fill * offset)


BROKEN_SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "length-only": (struct.pack("<Q", 400), "truncated"),
    "truncated-data": (safetensors({"a": 40})[:-1], "truncated"),
    "trailing-bytes": (safetensors({"a": 40}) + b"x", "too long"),
    "garbage": (b"\xde\xad\xbe\xef" * 40, "truncated or no safetensors"),
    "git-lfs-pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n",
        "git lfs pull",
    ),
    "header-no-json": (with_header("{'a': 1}", b""), "bad safetensors header"),
    "header-no-utf8": (struct.pack("<Q", 4) + b'{"\xff"', "bad safetensors header"),
    "header-nested-too-deep": (with_header('{"a":' + "[" * 100_000, b""), "bad safetensors header"),
    "duplicate-tensor": (
        with_header(f'{{"a": {json.dumps(u8(0, 4))}, "a": {json.dumps(u8(0, 4))}}}', b"1234"),
        "duplicate key 'a'",
    ),
    "overlap": (with_header({"a": u8(0, 4), "b": u8(2, 6)}, b"123456"), "b overlaps"),
    "gap": (with_header({"a": u8(0, 4), "b": u8(5, 6)}, b"123456"), "b leaves a gap"),
    "unknown-dtype": (with_header({"a": {**u8(0, 4), "dtype": "U9"}}, b"1234"), "a: "),
}
"""Fault -> file that has it, and what the message must say."""


def tiny_repository() -> dict[str, bytes]:
    """What a real repository holds: what a build needs, and much that it must not fetch."""
    weight_map = {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}
    return {
        "config.json": b'{"architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModel": "m.M"}}',
        "generation_config.json": b'{"eos_token_id": 2}',
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "LICENSE": b"do as you like\n",
        "NOTICE.txt": b"by acme\n",
        "USE_POLICY.md": b"be kind\n",
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        SHARDS[0]: safetensors({"a": 300_000, "b": 5}),
        SHARDS[1]: safetensors({"c": 1000}, b"\x02"),
        "README.md": b"# tiny\n",
        "modeling_tiny.py": b"raise SystemExit\n",
        "license_check.py": b"raise SystemExit\n",
        "consolidated.safetensors": safetensors({"a": 7}),
        "pytorch_model.bin": b"pickle",
        "original/consolidated.00.pth": b"pickle",
        "onnx/model.safetensors": safetensors({"a": 7}),
    }
