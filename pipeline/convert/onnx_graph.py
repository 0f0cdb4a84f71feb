"""The decoder as an ONNX opset-24 graph, for TensorRT-RTX and for ONNX Runtime.

One builder; the activations' dtype is a parameter: bfloat16 or float16 for RTX, float32 for ONNX
Runtime on a CPU. Node names are the Hugging Face module names, so that what a compiler prints can
be mapped back.

Inputs: `input_ids` [batch, sequence], `write_indices` [batch] (tokens already in the cache),
`logits_index` [batch, logits] (positions inside this step whose logits are wanted), all int64, and
`past_key.{l}`, `past_value.{l}` [batch, kv_heads, context, head_dim]. Outputs: `logits` float32
[batch, logits, vocab] and `present_*`, of the same shape as `past_*` and meant to be the same
memory. Batches of unequal prompts are padded on the right: a pad key lies behind its row's end, no
real query attends to it, and the next step overwrites it.

Three choices are forced by TensorRT-RTX 1.7.1 (measured 2026-11-24): the context length is static,
since its cache update demands it; the mask is computed in the graph, since its parser silently
drops `nonpad_kv_seqlen` and turns `is_causal` into the wrong alignment; and q/k/v and gate/up are
separate nodes, since it fuses them itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.convert.graph_writer import GraphWriter, WeightSlot
from pipeline.convert.rope import rope_tables
from pipeline.convert.unified import UnifiedCheckpoint

if TYPE_CHECKING:
    import numpy as np
    import onnx

ActivationDtype = Literal["float32", "bfloat16", "float16"]

OPSET = 24
"""The first with RMSNormalization's and RotaryEmbedding's companions TensorScatter and Swish."""
IR_VERSION = 11


def cache_names(kind: Literal["past", "present"], num_layers: int) -> list[str]:
    """Names of the cache tensors, keys and values of layer 0 first."""
    return [f"{kind}_{part}.{layer}" for layer in range(num_layers) for part in ("key", "value")]


def build_decoder(
    checkpoint: UnifiedCheckpoint,
    slots: Mapping[str, WeightSlot],
    *,
    context: int,
    activation: ActivationDtype,
    layers: tuple[int, ...] | None = None,
) -> onnx.ModelProto:
    """Build the graph; weights stay in the external file that `slots` describes.

    Args:
        checkpoint: Unified FP8 checkpoint or plain weights; linears with scales become FP8.
        slots: Result of `write_weights`.
        context: Static cache length, tokens.
        activation: Dtype of activations and cache.
        layers: Build only these decoder layers, in this order (embedding, final norm and lm_head
            stay); None for all. Cache tensors are numbered by position, modules keep their names.

    Raises:
        RecipeError: The config asks for something that this graph does not have.
        CorruptError: A tensor is missing or malformed.
    """
    import onnx

    config = checkpoint.config
    built = tuple(range(config.num_layers)) if layers is None else layers
    dtype = {
        "float32": onnx.TensorProto.FLOAT,
        "bfloat16": onnx.TensorProto.BFLOAT16,
        "float16": onnx.TensorProto.FLOAT16,
    }[activation]
    writer = GraphWriter(checkpoint, dict(slots), dtype)
    _Decoder(writer, config.num_heads, config.num_kv_heads, context).write(built)

    integer, info = onnx.TensorProto.INT64, onnx.helper.make_tensor_value_info
    cache = ["batch", config.num_kv_heads, context, config.head_dim]
    graph = onnx.helper.make_graph(
        writer.nodes,
        "decoder",
        [
            info("input_ids", integer, ["batch", "sequence"]),
            info("write_indices", integer, ["batch"]),
            info("logits_index", integer, ["batch", "logits_count"]),
            *(info(name, dtype, cache) for name in cache_names("past", len(built))),
        ],
        [
            info("logits", onnx.TensorProto.FLOAT, ["batch", "logits_count", config.vocab_size]),
            *(info(name, dtype, cache) for name in cache_names("present", len(built))),
        ],
        writer.initializers,
    )
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write the graph file; its weights must lie beside it as `weights.bin`."""
    path.write_bytes(model.SerializeToString(deterministic=True))


class _Decoder:
    """Writes the layers; B batch, S sequence, T context, D head_dim, H heads, K kv heads."""

    def __init__(self, writer: GraphWriter, heads: int, kv_heads: int, context: int) -> None:
        self._w = writer
        self._heads = heads
        self._kv_heads = kv_heads
        self._context = context
        self._config = writer.checkpoint.config

    def write(self, layers: tuple[int, ...]) -> None:
        """Embedding, the layers, final norm, lm_head on the wanted positions."""
        w = self._w
        embedding = w.weight_as_activation("model.embed_tokens.weight")
        hidden = w.op("Gather", [embedding, "input_ids"], "model.embed_tokens")  # [B, S, hidden]
        self._positions_and_mask()
        for slot, layer in enumerate(layers):
            hidden = self._layer(layer, slot, hidden)
        # Only the wanted rows reach lm_head: a 64 x 1024 prefill would write 12.9 GB of logits.
        hidden = w.op("GatherND", [hidden, self._logits_rows()], "logits_rows", batch_dims=1)
        hidden = self._norm("model.norm", hidden)
        head = "model.embed_tokens.weight" if self._config.tied else "lm_head.weight"
        transposed = w.op("Transpose", [w.weight_as_activation(head)], "lm_head.t", perm=[1, 0])
        logits = w.op("MatMul", [hidden, transposed], "lm_head")
        self._cast_output(logits)

    def _cast_output(self, logits: str) -> None:
        """Logits leave as float32 whatever the activations are."""
        import onnx

        self._w.op("Cast", [logits], "logits", to=onnx.TensorProto.FLOAT)

    def _logits_rows(self) -> str:
        """`logits_index` [B, N] as GatherND indices [B, N, 1]."""
        import numpy as np

        last = self._w.constant("axis_last", np.array([-1], np.int64))
        return self._w.op("Unsqueeze", ["logits_index", last], "logits_index.column")

    def _positions_and_mask(self) -> None:
        """`position_ids` [B, S] and the bool `attention_mask` [B, 1, S, T], shared by all layers.

        A key is visible when its index is at most the query's position: causal per row, and pads
        lie beyond it.
        """
        import numpy as np

        w = self._w
        zero, one = (w.constant(f"int_{n}", np.array(n, np.int64)) for n in (0, 1))
        first = w.constant("axis_first", np.array([0], np.int64))
        shape = w.op("Shape", ["input_ids"], "input_ids.shape", start=1, end=2)
        length = w.op("Squeeze", [shape, first], "sequence_length")
        steps = w.op("Range", [zero, length, one], "steps")
        last = w.constant("axis_last", np.array([-1], np.int64))
        start = w.op("Unsqueeze", ["write_indices", last], "write_indices.column")
        w.op("Add", [start, steps], "position_ids")
        keys = w.constant("key_index", np.arange(self._context, dtype=np.int64))
        axes = w.constant("mask_axes", np.array([1, 3], np.int64))
        queries = w.op("Unsqueeze", ["position_ids", axes], "query_index")  # [B, 1, S, 1]
        w.op("LessOrEqual", [keys, queries], "attention_mask")

        cos, sin = rope_tables(
            theta=self._config.rope_theta,
            rotary_dim=self._config.head_dim,
            context=self._context,
        )
        for name, table in (("rope_cos", cos), ("rope_sin", sin)):
            w.constant(name, table.astype(_numpy_dtype(w.dtype)))

    def _layer(self, layer: int, slot: int, hidden: str) -> str:
        """One decoder layer with its two residual additions; `slot` numbers its cache."""
        w, prefix = self._w, f"model.layers.{layer}"
        normed = self._norm(f"{prefix}.input_layernorm", hidden)
        attended = self._attention(slot, f"{prefix}.self_attn", normed)
        hidden = w.op("Add", [hidden, attended], f"{prefix}.attention_residual")
        normed = self._norm(f"{prefix}.post_attention_layernorm", hidden)
        return w.op("Add", [hidden, self._mlp(f"{prefix}.mlp", normed)], f"{prefix}.residual")

    def _attention(self, slot: int, prefix: str, hidden: str) -> str:
        """Grouped-query attention over the whole static cache, masked."""
        w = self._w
        query, key, value = self._linears(
            [f"{prefix}.{part}_proj" for part in ("q", "k", "v")], hidden
        )
        query = self._rotate(f"{prefix}.q_rope", self._split_heads(query, self._heads))
        key = self._rotate(f"{prefix}.k_rope", self._split_heads(key, self._kv_heads))
        value = self._split_heads(value, self._kv_heads)
        cached = [
            w.op(
                "TensorScatter",
                [f"past_{part}.{slot}", new, "write_indices"],
                f"present_{part}.{slot}",
                axis=2,
                mode="linear",
            )
            for part, new in (("key", key), ("value", value))
        ]
        attended = w.op(  # [B, H, S, D]
            "Attention", [query, *cached, "attention_mask"], f"{prefix}.attention"
        )
        merged = self._merge_heads(prefix, attended)
        return self._linears([f"{prefix}.o_proj"], merged)[0]

    def _mlp(self, prefix: str, hidden: str) -> str:
        """down(silu(gate(x)) * up(x))."""
        w = self._w
        gate, up = self._linears([f"{prefix}.gate_proj", f"{prefix}.up_proj"], hidden)
        sigmoid = w.op("Sigmoid", [gate], f"{prefix}.sigmoid")
        silu = w.op("Mul", [gate, sigmoid], f"{prefix}.silu")
        product = w.op("Mul", [silu, up], f"{prefix}.product")
        return self._linears([f"{prefix}.down_proj"], product)[0]

    def _linears(self, modules: list[str], x: str) -> list[str]:
        """Linears that read the same input: quantized once when they share one input scale."""
        quantized: dict[float, str] = {}
        outputs = []
        for module in modules:
            if self._w.checkpoint.is_fp8(module):
                scale = float(self._w.checkpoint.scalar(f"{module}.input_scale"))
                if scale not in quantized:
                    quantized[scale] = self._quantize(module, x, scale)
                outputs.append(self._matmul(module, quantized[scale], self._fp8_weight(module)))
            else:
                weight = self._w.weight_as_activation(f"{module}.weight")
                outputs.append(self._matmul(module, x, weight))
        return outputs

    def _matmul(self, module: str, x: str, weight: str) -> str:
        """Multiply x [.., in] with weight [out, in] transposed; the node has the module's name."""
        transposed = self._w.op("Transpose", [weight], f"{module}.weight.t", perm=[1, 0])
        return self._w.op("MatMul", [x, transposed], module)

    def _quantize(self, module: str, x: str, scale: float) -> str:
        """Round activations to E4M3 with the calibrated scale: the Q/DQ pair that FP8 GEMMs need.

        The scale stays float32: in float16 a scale below 6e-5 would be subnormal.
        """
        import ml_dtypes
        import numpy as np

        w = self._w
        scale_name = w.constant(f"{module}.input_scale", np.array(scale, np.float32))
        zero = w.constant("fp8_zero", np.zeros((), ml_dtypes.float8_e4m3fn))
        codes = w.op("QuantizeLinear", [x, scale_name, zero], f"{module}.input.q")
        return w.op(
            "DequantizeLinear",
            [codes, scale_name, zero],
            f"{module}.input.dq",
            output_dtype=w.dtype,
        )

    def _fp8_weight(self, module: str) -> str:
        """The checkpoint's E4M3 codes, dequantized in the graph."""
        import numpy as np

        w = self._w
        scale = w.constant(
            f"{module}.weight_scale",
            np.array(w.checkpoint.scalar(f"{module}.weight_scale"), np.float32),
        )
        codes = w.weight(f"{module}.weight")
        return w.op("DequantizeLinear", [codes, scale], f"{module}.weight.dq", output_dtype=w.dtype)

    def _norm(self, module: str, x: str) -> str:
        """RMS norm over the last axis, accumulated in float32."""
        return self._w.op(
            "RMSNormalization",
            [x, self._w.weight_as_activation(f"{module}.weight")],
            module,
            axis=-1,
            epsilon=self._config.rms_norm_eps,
            stash_type=1,
        )

    def _split_heads(self, x: str, heads: int) -> str:
        """[B, S, heads * D] -> [B, heads, S, D]."""
        import numpy as np

        target = np.array([0, 0, heads, self._config.head_dim], np.int64)
        shape = self._w.constant(f"split_{heads}_heads", target)
        reshaped = self._w.op("Reshape", [x, shape], f"{x}.heads")
        return self._w.op("Transpose", [reshaped], f"{x}.by_head", perm=[0, 2, 1, 3])

    def _merge_heads(self, prefix: str, x: str) -> str:
        """[B, H, S, D] -> [B, S, H * D]."""
        import numpy as np

        target = np.array([0, 0, self._heads * self._config.head_dim], np.int64)
        shape = self._w.constant("merge_heads", target)
        transposed = self._w.op("Transpose", [x], f"{prefix}.by_token", perm=[0, 2, 1, 3])
        return self._w.op("Reshape", [transposed, shape], f"{prefix}.merged")

    def _rotate(self, name: str, x: str) -> str:
        """Rotary embedding on [B, heads, S, D], half-split pairs."""
        return self._w.op(
            "RotaryEmbedding", [x, "rope_cos", "rope_sin", "position_ids"], name, interleaved=0
        )


def _numpy_dtype(onnx_type: int) -> np.dtype[Any]:
    """NumPy (or ml_dtypes) dtype of an ONNX element type."""
    import onnx

    dtype: np.dtype[Any] = onnx.helper.tensor_dtype_to_np_dtype(onnx_type)
    return dtype
