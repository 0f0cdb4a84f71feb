"""A tiny FP8 decoder, written by the real graph builder, and faults to plant in its ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx

from pipeline.formats.trtrtx.graph_writer import WEIGHTS_FILE, WeightSlot, write_weights
from pipeline.formats.trtrtx.network_check.guard import DecoderInterface
from pipeline.formats.trtrtx.onnx_graph import ActivationDtype, build_decoder
from pipeline.quant.unified import UnifiedCheckpoint
from tests.architectures import tiny_fp8_architecture

HIDDEN, INNER, HEADS, KV_HEADS, VOCAB, CONTEXT = 32, 48, 4, 2, 64, 24
HEAD_DIM = HIDDEN // HEADS


def interface(dtype: Literal["bfloat16", "float16"] = "bfloat16") -> DecoderInterface:
    return DecoderInterface(
        num_hidden_layers=2,
        num_key_value_heads=KV_HEADS,
        context=CONTEXT,
        head_dim=HEAD_DIM,
        rotary_dim=HEAD_DIM,
        vocab_size=VOCAB,
        dtype=dtype,
    )


class TinyDecoder:
    """The graphs of a checkpoint of two layers with random weights.

    Args:
        folder: Gets the checkpoint.
        architecture: One of `tests.architectures`; None for a Llama whose layer 1 keeps its o_proj
            in bfloat16.
        context: Cache length, tokens.
    """

    def __init__(
        self, folder: Path, architecture: str | None = None, context: int = CONTEXT
    ) -> None:
        self.dir = folder
        self._context = context
        if architecture is None:
            _write_checkpoint(folder)
        else:
            tiny_fp8_architecture(architecture, folder, num_hidden_layers=2)
        self.checkpoint = UnifiedCheckpoint(folder)
        self._slots: dict[str, WeightSlot] = write_weights(self.checkpoint, folder / WEIGHTS_FILE)

    def interface(self, dtype: Literal["bfloat16", "float16"] = "bfloat16") -> DecoderInterface:
        return DecoderInterface.of(self.checkpoint.spec, context=self._context, dtype=dtype)

    def model(self, activation: ActivationDtype) -> onnx.ModelProto:
        """The decoder graph, to be changed by a test."""
        return build_decoder(
            self.checkpoint, self._slots, context=self._context, activation=activation
        )

    def save(self, model: onnx.ModelProto, name: str) -> Path:
        path = self.dir / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        return path


def _write_checkpoint(folder: Path) -> None:
    rng = np.random.default_rng(7)
    tensors: dict[str, np.ndarray[Any, Any]] = {}

    def linear(name: str, out: int, size: int) -> None:
        weight = rng.standard_normal((out, size)) / np.sqrt(size)
        if name.endswith("layers.1.self_attn.o_proj"):
            tensors[f"{name}.weight"] = weight.astype(ml_dtypes.bfloat16)
            return
        scale = np.float32(np.abs(weight).max() / 448)
        tensors[f"{name}.weight"] = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}.weight_scale"] = scale.reshape(1)
        input_scale = 0.013 if name.startswith("model.layers.0.") else 0.017
        tensors[f"{name}.input_scale"] = np.array([input_scale], np.float32)

    def norm(name: str) -> None:
        weight = 1 + 0.1 * rng.standard_normal(HIDDEN)
        tensors[f"{name}.weight"] = weight.astype(ml_dtypes.bfloat16)

    embedding = rng.standard_normal((VOCAB, HIDDEN)).astype(ml_dtypes.bfloat16)
    tensors["model.embed_tokens.weight"] = embedding
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        norm(f"{prefix}.input_layernorm")
        norm(f"{prefix}.post_attention_layernorm")
        linear(f"{prefix}.self_attn.q_proj", HIDDEN, HIDDEN)
        linear(f"{prefix}.self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN)
        linear(f"{prefix}.self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN)
        linear(f"{prefix}.self_attn.o_proj", HIDDEN, HIDDEN)
        linear(f"{prefix}.mlp.gate_proj", INNER, HIDDEN)
        linear(f"{prefix}.mlp.up_proj", INNER, HIDDEN)
        linear(f"{prefix}.mlp.down_proj", HIDDEN, INNER)
    norm("model.norm")
    _write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_act": "silu",
                "hidden_size": HIDDEN,
                "intermediate_size": INNER,
                "num_hidden_layers": 2,
                "num_attention_heads": HEADS,
                "num_key_value_heads": KV_HEADS,
                "head_dim": HEAD_DIM,
                "vocab_size": VOCAB,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "max_position_embeddings": CONTEXT,
                "tie_word_embeddings": True,
            }
        )
    )


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    """By hand, since safetensors' NumPy side knows no FP8."""
    tags = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float32": "F32"}
    header, offset = {}, 0
    for name, values in tensors.items():
        end = offset + values.nbytes
        header[name] = {
            "dtype": tags[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    data = b"".join(values.tobytes() for values in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    """The node that makes `output`."""
    return next(node for node in model.graph.node if output in node.output)


def insert_after(model: onnx.ModelProto, name: str, op: str, **attributes: Any) -> None:
    """Put a node with one input behind the tensor `name`; all that read it read the new node."""
    index = next(i for i, one in enumerate(model.graph.node) if name in one.output)
    for other in model.graph.node:
        for position, read in enumerate(other.input):
            if read == name:
                other.input[position] = "inserted"
    inserted = onnx.helper.make_node(op, [name], ["inserted"], name="inserted", **attributes)
    model.graph.node.insert(index + 1, inserted)
