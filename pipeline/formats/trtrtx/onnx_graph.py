"""The decoder as an ONNX opset-24 graph, for TensorRT-RTX and for ONNX Runtime; its stage.

One builder; the activations' dtype is a parameter: bfloat16 or float16 for RTX, float32 for ONNX
Runtime on a CPU. Nodes have Hugging Face module names, so that what a compiler prints maps back.

Inputs: `input_ids` [batch, sequence], `write_indices` [batch] (tokens already in the cache),
`logits_index` [batch, logits] (positions inside this step whose logits are wanted), all int64, and
`past_key.{l}`, `past_value.{l}` [batch, kv_heads, context, head_dim]. Outputs: `logits` float32
[batch, logits, vocab] and `present_*`, meant to be the same memory as `past_*`. Batches of unequal
prompts are padded on the right (`pipeline.runners.decode`).

Four choices are forced by TensorRT-RTX 1.7.1 (measured 2026-11-24 and -25): the context length is
static, since its cache update demands it; the mask is computed in the graph, since its parser
silently drops `nonpad_kv_seqlen` and turns `is_causal` into the wrong alignment; q/k/v and gate/up
are separate nodes, since it fuses them itself; and of the attention scale only a power of four is
left to it, since it rounds that scale's root to 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.core.cache import Stage, StageCache, StageResult
from pipeline.core.errors import RecipeError
from pipeline.formats.trtrtx.graph_writer import (
    WEIGHTS_FILE,
    GraphWriter,
    MatMul,
    WeightSlot,
    matmuls,
    write_linears,
    write_weights,
)
from pipeline.model.spec import Layer, ModelSpec, layer_name, not_built, rope_tables
from pipeline.quant.unified import UnifiedCheckpoint

if TYPE_CHECKING:
    import onnx

ActivationDtype = Literal["float32", "bfloat16", "float16"]

OPSET = 24
"""The first with TensorScatter and Swish."""
IR_VERSION = 11

RTX_GRAPH = "rtx.onnx"
"""What TensorRT-RTX compiles."""
CPU_GRAPH = "cpu.onnx"
"""The same graph in float32, for ONNX Runtime on a CPU."""
RTX_CUT = "rtx-cut.onnx"
CPU_CUT = "cpu-cut.onnx"
"""Both with two layers only, for the network check."""
CUT_LAYERS = 2
_CUT_CONTEXT = 64
"""Cache length of the cut, tokens: longer than the check's prompts, and fast to evaluate."""

GRAPH_CODE = (
    "pipeline.model.dense",
    "pipeline.model.families",
    "pipeline.model.read",
    "pipeline.model.spec",
    "pipeline.formats.trtrtx.graph_writer",
    "pipeline.formats.trtrtx.onnx_graph",
    "pipeline.quant.unified",
)
"""The modules that shape the bytes of a graph; not those of other formats."""
STAGE = Stage(name="convert", version=1, code=GRAPH_CODE)


def build_decoder(
    checkpoint: UnifiedCheckpoint,
    slots: Mapping[str, WeightSlot],
    *,
    context: int,
    activation: ActivationDtype,
    layers: tuple[int, ...] | None = None,
) -> onnx.ModelProto:
    """Build the graph; weights stay in the external file, `slots` being of `write_weights`.

    `layers` are only these decoder layers, None all; caches are numbered by position, modules keep
    their names.
    """
    import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
    import numpy as np
    import onnx

    spec = checkpoint.spec
    attention = buildable_layer(spec).attention
    built = tuple(range(spec.num_layers)) if layers is None else layers
    dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(activation))
    writer = GraphWriter(checkpoint, dict(slots), dtype)
    _Decoder(writer, spec, context).write(built)

    integer, info = onnx.TensorProto.INT64, onnx.helper.make_tensor_value_info
    shape = ["batch", attention.kv_heads, context, attention.head_dim]

    def caches(kind: str) -> list[onnx.ValueInfoProto]:
        names = (f"{kind}_{part}.{n}" for n in range(len(built)) for part in ("key", "value"))
        return [info(name, dtype, shape) for name in names]

    graph = onnx.helper.make_graph(
        writer.nodes,
        "decoder",
        [
            info("input_ids", integer, ["batch", "sequence"]),
            info("write_indices", integer, ["batch"]),
            info("logits_index", integer, ["batch", "logits_count"]),
            *caches("past"),
        ],
        [
            info("logits", onnx.TensorProto.FLOAT, ["batch", "logits_count", spec.vocab_size]),
            *caches("present"),
        ],
        writer.initializers,
    )
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )


def buildable_layer(spec: ModelSpec) -> Layer:
    """The layer that all layers are like; a `RecipeError` where the graph cannot express it."""
    layer = spec.uniform_layer()
    faults = [
        not_built(key, "is not in our decoder graph")
        for key, present in (
            ("attn_logit_softcapping", layer.attention.softcap is not None),
            ("hidden_act", layer.activation != "silu"),
        )
        if present
    ]
    if faults:
        raise RecipeError(faults)
    return layer


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write the graph file; its weights must lie beside it."""
    path.write_bytes(model.SerializeToString(deterministic=True))


class _Decoder:
    """Writes the layers; B batch, S sequence, T context, D head_dim, H heads, K kv heads."""

    def __init__(self, writer: GraphWriter, spec: ModelSpec, context: int) -> None:
        self._w = writer
        self._spec = spec
        self._attended = spec.layers[0].attention
        self._context = context

    def write(self, layers: tuple[int, ...]) -> None:
        """Embedding, the layers, final norm, lm_head on the wanted positions only.

        A 64 x 1024 prefill would else write 12.9 GB of logits, float32 for all activations.
        """
        import onnx

        w = self._w
        embedding = w.weight_as_activation("model.embed_tokens.weight")
        hidden = w.op("Gather", [embedding, "input_ids"], "model.embed_tokens")  # [B, S, hidden]
        self._positions_and_mask()
        for slot, layer in enumerate(layers):
            hidden = self._layer(layer, slot, hidden)
        last = w.integers("axis_last", [-1])
        rows = w.op("Unsqueeze", ["logits_index", last], "logits_index.column")  # [B, N, 1]
        hidden = w.op("GatherND", [hidden, rows], "logits_rows", batch_dims=1)
        hidden = self._norm("model.norm", hidden)
        head = "model.embed_tokens.weight" if self._spec.tied else "lm_head.weight"
        transposed = w.op("Transpose", [w.weight_as_activation(head)], "lm_head.t", perm=[1, 0])
        logits = w.op("MatMul", [hidden, transposed], "lm_head")
        w.op("Cast", [logits], "logits", to=onnx.TensorProto.FLOAT)

    def _positions_and_mask(self) -> None:
        """`position_ids` [B, S] and the bool `attention_mask` [B, 1, S, T], shared by all layers.

        A key is visible when its index is at most the query's position: causal per row, and pads
        lie beyond it. With a sliding window, unless no context exceeds it, it must also be one of
        the last `sliding_window` positions, the query's own included.
        """
        import onnx

        w = self._w
        zero, one = (w.integers(f"int_{n}", n) for n in (0, 1))
        first = w.integers("axis_first", [0])
        shape = w.op("Shape", ["input_ids"], "input_ids.shape", start=1, end=2)
        length = w.op("Squeeze", [shape, first], "sequence_length")
        steps = w.op("Range", [zero, length, one], "steps")
        last = w.integers("axis_last", [-1])
        start = w.op("Unsqueeze", ["write_indices", last], "write_indices.column")
        w.op("Add", [start, steps], "position_ids")
        keys = w.integers("key_index", range(self._context))
        axes = w.integers("mask_axes", [1, 3])
        queries = w.op("Unsqueeze", ["position_ids", axes], "query_index")  # [B, 1, S, 1]
        window = self._attended.window
        if window is None or window >= self._context:
            w.op("LessOrEqual", [keys, queries], "attention_mask")
        else:
            width = w.integers("sliding_window", window)
            hidden = w.op("Sub", [queries, width], "last_hidden_key")
            causal = w.op("LessOrEqual", [keys, queries], "causal_mask")
            near = w.op("Greater", [keys, hidden], "window_mask")
            w.op("And", [causal, near], "attention_mask")

        cos, sin = rope_tables(self._spec.rope, context=self._context)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(w.dtype)
        for name, table in (("rope_cos", cos), ("rope_sin", sin)):
            w.constant(name, table.astype(dtype))

    def _layer(self, layer: int, slot: int, hidden: str) -> str:
        w, prefix = self._w, layer_name(layer)
        linears = matmuls(self._spec.layers[layer], layer)
        normed = self._norm(f"{prefix}.input_layernorm", hidden)
        attended = self._attention(slot, f"{prefix}.self_attn", linears, normed)
        hidden = w.op("Add", [hidden, attended], f"{prefix}.attention_residual")
        normed = self._norm(f"{prefix}.post_attention_layernorm", hidden)
        mlp = self._mlp(f"{prefix}.mlp", linears, normed)
        return w.op("Add", [hidden, mlp], f"{prefix}.residual")

    def _attention(self, slot: int, prefix: str, linears: Mapping[str, MatMul], hidden: str) -> str:
        """Grouped-query attention over the whole static cache, masked; `slot` numbers the cache."""
        w = self._w
        query, key, value = write_linears(w, [linears[role] for role in "qkv"], hidden)
        heads, kv_heads = self._attended.heads, self._attended.kv_heads
        query, scale = self._scale_query(prefix, self._turned(f"{prefix}.q", query, heads))
        key = self._turned(f"{prefix}.k", key, kv_heads)
        value = self._split_heads(value, kv_heads)
        cached = []
        for part, new in (("key", key), ("value", value)):
            inputs = [f"past_{part}.{slot}", new, "write_indices"]
            name = f"present_{part}.{slot}"
            cached.append(w.op("TensorScatter", inputs, name, axis=2, mode="linear"))
        attended = w.op(  # [B, H, S, D]
            "Attention", [query, *cached, "attention_mask"], f"{prefix}.attention", scale=scale
        )
        merged = self._merge_heads(prefix, attended)
        return write_linears(w, [linears["o"]], merged)[0]

    def _turned(self, name: str, x: str, heads: int) -> str:
        """Queries or keys by head, [B, heads, S, D]: each with its norm, if any, and rotated."""
        x = self._split_heads(x, heads)
        if self._attended.qk_norm:
            x = self._norm(f"{name}_norm", x)
        return self._rotate(f"{name}_rope", x)

    def _scale_query(self, prefix: str, query: str) -> tuple[str, float]:
        """The queries times a part of 1 / sqrt(D), and the rest, which the operator multiplies.

        TensorRT-RTX 1.7.1 multiplies queries and keys by the rest's square root, rounded to the
        activations' type: for D = 96 in bfloat16 the scores would be 0.5 % too large (the constant
        stands in the plan's attention kernel). So the rest is a power of four, whose root is exact,
        and the other part is multiplied in float32. With a rest of 1 it would copy the whole key
        cache in every step (both read from plans, 2026-11-25).
        """
        import numpy as np
        import onnx

        w = self._w
        scale = self._attended.scale
        rest = 4.0 ** math.floor(math.log(scale, 4) + 1e-9)
        if math.isclose(rest, scale):
            return query, rest
        factor = w.constant("query_scale", np.array(scale / rest, np.float32))
        if w.dtype == onnx.TensorProto.FLOAT:
            return w.op("Mul", [query, factor], f"{prefix}.q_scaled"), rest
        wide = w.op("Cast", [query], f"{prefix}.q_wide", to=onnx.TensorProto.FLOAT)
        scaled = w.op("Mul", [wide, factor], f"{prefix}.q_scaled_wide")
        return w.op("Cast", [scaled], f"{prefix}.q_scaled", to=w.dtype), rest

    def _mlp(self, prefix: str, linears: Mapping[str, MatMul], hidden: str) -> str:
        """down(silu(gate(x)) * up(x))."""
        w = self._w
        gate, up = write_linears(w, [linears["gate"], linears["up"]], hidden)
        sigmoid = w.op("Sigmoid", [gate], f"{prefix}.sigmoid")
        silu = w.op("Mul", [gate, sigmoid], f"{prefix}.silu")
        product = w.op("Mul", [silu, up], f"{prefix}.product")
        return write_linears(w, [linears["down"]], product)[0]

    def _norm(self, module: str, x: str) -> str:
        inputs, epsilon = [x, self._w.weight_as_activation(f"{module}.weight")], self._spec.norm_eps
        return self._w.op(
            "RMSNormalization", inputs, module, axis=-1, epsilon=epsilon, stash_type=1
        )

    def _split_heads(self, x: str, heads: int) -> str:
        """[B, S, heads * D] -> [B, heads, S, D]."""
        shape = self._w.integers(f"split_{heads}_heads", [0, 0, heads, self._attended.head_dim])
        reshaped = self._w.op("Reshape", [x, shape], f"{x}.heads")
        return self._w.op("Transpose", [reshaped], f"{x}.by_head", perm=[0, 2, 1, 3])

    def _merge_heads(self, prefix: str, x: str) -> str:
        """[B, H, S, D] -> [B, S, H * D]."""
        width = self._attended.heads * self._attended.head_dim
        shape = self._w.integers("merge_heads", [0, 0, width])
        transposed = self._w.op("Transpose", [x], f"{prefix}.by_token", perm=[0, 2, 1, 3])
        return self._w.op("Reshape", [transposed, shape], f"{prefix}.merged")

    def _rotate(self, name: str, x: str) -> str:
        """Rotary embedding on [B, heads, S, D], half-split pairs; what does not turn passes.

        So does the kernel that TensorRT-RTX 1.7.1 writes (its CUDA source in the plan, 2026-11-25).
        """
        turned = self._spec.rope.rotary_dim
        partial = {} if turned == self._attended.head_dim else {"rotary_embedding_dim": turned}
        inputs = [x, "rope_cos", "rope_sin", "position_ids"]
        return self._w.op("RotaryEmbedding", inputs, name, interleaved=0, **partial)


@dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """What the graphs depend on beside the checkpoint: static cache length, dtype for RTX."""

    context: int
    activation: ActivationDtype

    def inputs(self) -> dict[str, Any]:
        """Everything but the checkpoint that shapes the graphs' bytes."""
        tools = {"onnx": version("onnx")}
        return {**STAGE.identity, **asdict(self), "tools": tools}


def convert(
    checkpoint_dir: Path, checkpoint_digest: str, settings: GraphSettings, cache: StageCache
) -> StageResult:
    """Write the graphs of a checkpoint, or take them from the cache."""
    inputs = {"checkpoint": checkpoint_digest, **settings.inputs()}
    return cache.run(STAGE, inputs, lambda out: write_graphs(checkpoint_dir, settings, out))


def cut_context(spec: ModelSpec, context: int) -> int:
    """Cache length of the cut of a graph whose own is `context`, tokens.

    It reaches beyond a sliding window that the graph has, so that the cut has one too.
    """
    window = spec.window
    beyond = window if window is not None and window < context else 0
    return min(context, beyond + _CUT_CONTEXT)


def cut_layers(checkpoint: UnifiedCheckpoint) -> tuple[int, ...]:
    """The two neighbouring layers with the most quantized linears, the first such pair.

    A recipe may keep the first layers in 16 bits, and their cut would show no quantized linear.
    """
    count = checkpoint.spec.num_layers
    width = min(CUT_LAYERS, count)
    pairs = (tuple(range(first, first + width)) for first in range(count - width + 1))
    return max(pairs, key=lambda pair: len(quantized_linears(checkpoint, pair)))


def quantized_linears(checkpoint: UnifiedCheckpoint, layers: tuple[int, ...]) -> tuple[str, ...]:
    """Those of some layers."""
    prefixes = tuple(f"{layer_name(layer)}." for layer in layers)
    return tuple(name for name in checkpoint.quantized_linears if name.startswith(prefixes))


def write_graphs(checkpoint_dir: Path, settings: GraphSettings, out_dir: Path) -> None:
    """Write weights, the two graphs and their cuts into `out_dir`."""
    checkpoint = UnifiedCheckpoint(checkpoint_dir)
    slots = write_weights(checkpoint, out_dir / WEIGHTS_FILE)
    short = cut_context(checkpoint.spec, settings.context)
    cut = cut_layers(checkpoint)
    for name, activation, context, layers in (
        (RTX_GRAPH, settings.activation, settings.context, None),
        (CPU_GRAPH, "float32", settings.context, None),
        (RTX_CUT, settings.activation, short, cut),
        (CPU_CUT, "float32", short, cut),
    ):
        graph = build_decoder(
            checkpoint, slots, context=context, activation=activation, layers=layers
        )
        save_graph(graph, out_dir / name)
