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
from pipeline.model.spec import (
    Attention,
    ModelSpec,
    Rope,
    YarnScaling,
    layer_name,
    not_built,
    rope_tables,
)
from pipeline.quant.spec import SHAPING_CODE
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
    "pipeline.formats.trtrtx.graph_writer",
    "pipeline.formats.trtrtx.onnx_graph",
    *SHAPING_CODE,
)
"""The modules that shape the bytes of a graph, patterns of precisions among them."""
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
    attention = buildable_attention(spec)
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


def buildable_attention(spec: ModelSpec) -> Attention:
    """The first layer's; all have its heads. A `RecipeError` where the graph cannot express one."""
    attentions = [layer.attention for layer in spec.layers]
    heads = {(one.heads, one.kv_heads, one.head_dim, one.scale) for one in attentions}
    faults = [
        not_built(key, "is not in our decoder graph")
        for key, present in (
            ("layer_types with heads of their own", len(heads) > 1),
            ("attn_logit_softcapping", any(one.softcap is not None for one in attentions)),
            ("hidden_act", any(layer.activation not in _ACTIVATIONS for layer in spec.layers)),
        )
        if present
    ]
    if faults:
        raise RecipeError(faults)
    return attentions[0]


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write the graph file; its weights must lie beside it."""
    path.write_bytes(model.SerializeToString(deterministic=True))


def _silu(w: GraphWriter, gate: str, prefix: str) -> str:
    sigmoid = w.op("Sigmoid", [gate], f"{prefix}.sigmoid")
    return w.op("Mul", [gate, sigmoid], f"{prefix}.silu")


def _gelu_tanh(w: GraphWriter, gate: str, prefix: str) -> str:
    return w.op("Gelu", [gate], f"{prefix}.gelu", approximate="tanh")


_ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}


class _Decoder:
    """Writes the layers; B batch, S sequence, T context, D head_dim, H heads, K kv heads."""

    def __init__(self, writer: GraphWriter, spec: ModelSpec, context: int) -> None:
        self._w = writer
        self._spec = spec
        self._context = context
        self._masks: dict[int | None, str] = {}
        self._tables: dict[Rope, list[str]] = {}
        self._gains: dict[Rope, str] = {}

    def write(self, layers: tuple[int, ...]) -> None:
        """Embedding, the layers, final norm, lm_head on the wanted positions only.

        A 64 x 1024 prefill would else write 12.9 GB of logits, float32 for all activations.
        """
        import onnx

        w = self._w
        embedding = w.weight_as_activation("model.embed_tokens.weight")
        hidden = w.op("Gather", [embedding, "input_ids"], "model.embed_tokens")  # [B, S, hidden]
        if self._spec.embedding_scale != 1:
            scale = self._array("embedding_scale", self._spec.embedding_scale)
            hidden = w.op("Mul", [hidden, scale], "model.embed_tokens.scaled")
        attentions = [self._spec.layers[layer].attention for layer in layers]
        self._positions()
        for window in dict.fromkeys(map(self._window, attentions)):
            self._add_mask(window)
        for rope in dict.fromkeys(one.rope for one in attentions):
            self._add_tables(rope)
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

    def _array(self, name: str, values: Any) -> str:
        """A constant in the activations' type."""
        import numpy as np
        import onnx

        dtype = onnx.helper.tensor_dtype_to_np_dtype(self._w.dtype)
        return self._w.constant(name, np.asarray(values).astype(dtype))

    def _window(self, attention: Attention) -> int | None:
        """Its window, unless no request is longer."""
        window = attention.window
        return window if window is not None and window < self._context else None

    def _positions(self) -> None:
        """`position_ids` [B, S], and `query_index` [B, 1, S, 1], which masks compare with keys."""
        w = self._w
        zero, one = (w.integers(f"int_{n}", n) for n in (0, 1))
        first = w.integers("axis_first", [0])
        shape = w.op("Shape", ["input_ids"], "input_ids.shape", start=1, end=2)
        length = w.op("Squeeze", [shape, first], "sequence_length")
        steps = w.op("Range", [zero, length, one], "steps")
        last = w.integers("axis_last", [-1])
        start = w.op("Unsqueeze", ["write_indices", last], "write_indices.column")
        w.op("Add", [start, steps], "position_ids")
        w.integers("key_index", range(self._context))
        axes = w.integers("mask_axes", [1, 3])
        w.op("Unsqueeze", ["position_ids", axes], "query_index")

    def _add_mask(self, window: int | None) -> None:
        """The bool mask [B, 1, S, T] of the layers with this window.

        A key is visible when its index is at most the query's position: causal per row, and pads
        lie beyond it. With a window it must also be one of that many last positions, the query's
        own included.
        """
        w, end = self._w, f".{len(self._masks)}" if self._masks else ""
        name = self._masks[window] = f"attention_mask{end}"
        if window is None:
            w.op("LessOrEqual", ["key_index", "query_index"], name)
            return
        width = w.integers(f"sliding_window{end}", window)
        hidden = w.op("Sub", ["query_index", width], f"last_hidden_key{end}")
        causal = w.op("LessOrEqual", ["key_index", "query_index"], f"causal_mask{end}")
        near = w.op("Greater", ["key_index", hidden], f"window_mask{end}")
        w.op("And", [causal, near], name)

    def _add_tables(self, rope: Rope) -> None:
        """Cosines and sines of the layers that rotate so; what multiplies queries, [B, 1, S, 1]."""
        end = f".{len(self._tables)}" if self._tables else ""
        tables = zip(("cos", "sin"), rope_tables(rope, context=self._context), strict=True)
        self._tables[rope] = [self._array(f"rope_{name}{end}", table) for name, table in tables]
        yarn, w = rope.scaling, self._w
        if not isinstance(yarn, YarnScaling) or not yarn.query_beta:
            return
        if self._context > yarn.original_max_position_embeddings:
            table = self._array(f"query_gains{end}", yarn.query_factors(self._context))
            rows = w.op("Gather", [table, "position_ids"], f"query_gain.by_token{end}")
            self._gains[rope] = w.op("Unsqueeze", [rows, "mask_axes"], f"query_gain{end}")

    def _layer(self, layer: int, slot: int, hidden: str) -> str:
        w, prefix, spec = self._w, layer_name(layer), self._spec.layers[layer]
        linears = matmuls(spec, layer)

        def normed(role: str, x: str) -> str:
            norm = spec.norm(role)
            return x if norm is None else self._norm(f"{prefix}.{norm.module}", x)

        attended = self._attention(layer, slot, linears, normed("attention_in", hidden))
        attended = normed("attention_out", attended)
        hidden = w.op("Add", [hidden, attended], f"{prefix}.attention_residual")
        gate, up = write_linears(w, [linears["gate"], linears["up"]], normed("mlp_in", hidden))
        active = _ACTIVATIONS[spec.activation](w, gate, f"{prefix}.mlp")
        product = w.op("Mul", [active, up], f"{prefix}.mlp.product")
        mlp = normed("mlp_out", write_linears(w, [linears["down"]], product)[0])
        return w.op("Add", [hidden, mlp], f"{prefix}.residual")

    def _attention(self, layer: int, slot: int, linears: Mapping[str, MatMul], hidden: str) -> str:
        """Grouped-query attention over the whole static cache, masked; `slot` numbers the cache."""
        w, spec = self._w, self._spec.layers[layer].attention
        prefix = f"{layer_name(layer)}.{spec.module}"
        query, key, value = write_linears(w, [linears[role] for role in "qkv"], hidden)
        query = self._turned(layer, "q", query)
        if gain := self._gains.get(spec.rope):
            query = w.op("Mul", [query, gain], f"{prefix}.q_gained")
        query, scale = self._scale_query(prefix, query, spec.scale)
        key = self._turned(layer, "k", key)
        value = self._split_heads(value, spec.kv_heads, spec)
        cached = []
        for part, new in (("key", key), ("value", value)):
            inputs = [f"past_{part}.{slot}", new, "write_indices"]
            name = f"present_{part}.{slot}"
            cached.append(w.op("TensorScatter", inputs, name, axis=2, mode="linear"))
        mask = self._masks[self._window(spec)]
        attended = w.op(  # [B, H, S, D]
            "Attention", [query, *cached, mask], f"{prefix}.attention", scale=scale
        )
        merged = self._merge_heads(prefix, attended, spec)
        return write_linears(w, [linears["o"]], merged)[0]

    def _turned(self, number: int, role: str, x: str) -> str:
        """Queries or keys by head, [B, heads, S, D]: each with its norm, if any, and rotated."""
        layer, prefix = self._spec.layers[number], layer_name(number)
        spec = layer.attention
        x = self._split_heads(x, spec.heads if role == "q" else spec.kv_heads, spec)
        if norm := layer.norm(role):
            x = self._norm(f"{prefix}.{norm.module}", x)
        return self._rotate(f"{prefix}.{spec.module}.{role}_rope", x, spec)

    def _scale_query(self, prefix: str, query: str, scale: float) -> tuple[str, float]:
        """The queries times a part of the scale, and the rest, which the operator multiplies.

        TensorRT-RTX 1.7.1 multiplies queries and keys by the rest's square root, rounded to the
        activations' type: for D = 96 in bfloat16 the scores would be 0.5 % too large (the constant
        stands in the plan's attention kernel). So the rest is a power of four, whose root is exact,
        and the other part is multiplied in float32. With a rest of 1 it would copy the whole key
        cache in every step (both read from plans, 2026-11-25).
        """
        import numpy as np
        import onnx

        w = self._w
        rest = 4.0 ** math.floor(math.log(scale, 4) + 1e-9)
        if math.isclose(rest, scale):
            return query, rest
        factor = w.constant("query_scale", np.array(scale / rest, np.float32))
        if w.dtype == onnx.TensorProto.FLOAT:
            return w.op("Mul", [query, factor], f"{prefix}.q_scaled"), rest
        wide = w.op("Cast", [query], f"{prefix}.q_wide", to=onnx.TensorProto.FLOAT)
        scaled = w.op("Mul", [wide, factor], f"{prefix}.q_scaled_wide")
        return w.op("Cast", [scaled], f"{prefix}.q_scaled", to=w.dtype), rest

    def _norm(self, module: str, x: str) -> str:
        """Norm over the last axis; with an offset all in float32, as Gemma's own code does it."""
        import numpy as np
        import onnx

        w, single = self._w, onnx.TensorProto.FLOAT
        kind: dict[str, Any] = {"epsilon": self._spec.norm_eps, "axis": -1, "stash_type": 1}
        if not self._spec.norm_offset:
            gain = w.weight_as_activation(f"{module}.weight")
            return w.op("RMSNormalization", [x, gain], module, **kind)
        offset = w.constant("norm_offset", np.array(self._spec.norm_offset, np.float32))
        weight = w.op("Cast", [w.weight(f"{module}.weight")], f"{module}.weight.wide", to=single)
        gain = w.op("Add", [weight, offset], f"{module}.gain")
        if w.dtype == single:
            return w.op("RMSNormalization", [x, gain], module, **kind)
        wide = w.op("Cast", [x], f"{module}.input.wide", to=single)
        wide = w.op("RMSNormalization", [wide, gain], f"{module}.wide", **kind)
        return w.op("Cast", [wide], module, to=w.dtype)

    def _split_heads(self, x: str, heads: int, spec: Attention) -> str:
        """[B, S, heads * D] -> [B, heads, S, D]."""
        shape = self._w.integers(f"split_{heads}_heads", [0, 0, heads, spec.head_dim])
        reshaped = self._w.op("Reshape", [x, shape], f"{x}.heads")
        return self._w.op("Transpose", [reshaped], f"{x}.by_head", perm=[0, 2, 1, 3])

    def _merge_heads(self, prefix: str, x: str, spec: Attention) -> str:
        """[B, H, S, D] -> [B, S, H * D]."""
        shape = self._w.integers("merge_heads", [0, 0, spec.heads * spec.head_dim])
        transposed = self._w.op("Transpose", [x], f"{prefix}.by_token", perm=[0, 2, 1, 3])
        return self._w.op("Reshape", [transposed, shape], f"{prefix}.merged")

    def _rotate(self, name: str, x: str, spec: Attention) -> str:
        """Rotary embedding on [B, heads, S, D], half-split pairs; what does not turn passes.

        So does the kernel that TensorRT-RTX 1.7.1 writes (its CUDA source in the plan, 2026-11-25).
        """
        turned = spec.rope.rotary_dim
        partial = {} if turned == spec.head_dim else {"rotary_embedding_dim": turned}
        inputs = [x, *self._tables[spec.rope], "position_ids"]
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
    """The two neighbouring layers of most kinds, then with the most quantized linears; the first.

    A recipe may keep the first layers in 16 bits, and their cut would show no quantized linear.
    """
    count = checkpoint.spec.num_layers
    width = min(CUT_LAYERS, count)
    pairs = (tuple(range(first, first + width)) for first in range(count - width + 1))

    def shown(pair: tuple[int, ...]) -> tuple[int, int]:
        kinds = {checkpoint.spec.layers[number] for number in pair}
        return len(kinds), len(quantized_linears(checkpoint, pair))

    return max(pairs, key=shown)


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
