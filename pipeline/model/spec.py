"""ModelSpec: what an architecture is, as far as plans, quantizers and converters need to know.

A frozen value without a line about any runtime. Families (`pipeline.model.families`) make it from a
`config.json`; nothing else lists the linears of a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import Fault, RecipeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
LM_HEAD = "lm_head"


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One projection; several may be rows of one stored module, as q, k and v of Phi-3 are.

    Attributes:
        role: `q`, `k`, `v`, `o`, `gate`, `up` or `down`.
        module: Transformers' name of the module that stores it, without its layer's.
        rows: Output features, from `first_row` on in the stored module.
        columns: Input features.
        fused: Name of the group that runtimes merge into one GEMM, which has one precision and one
            weight scale, such as `qkv`; empty for none.
    """

    role: str
    module: str
    rows: int
    columns: int
    first_row: int = 0
    bias: bool = False
    fused: str = ""


@dataclass(frozen=True, kw_only=True)
class Norm:
    """An RMS norm: its module without its layer's name, and its features.

    `role` says what it reads: `attention_in` and `mlp_in` what their part of the layer reads,
    `attention_out` and `mlp_out` what it adds to the residual stream, `q` and `k` each head.
    """

    role: str
    module: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention.

    Attributes:
        scale: Multiplies the scores.
        window: How many keys a query sees, its own included; None for all.
        rope: How queries and keys are rotated.
        qk_norm: Each head of q and k has a norm before its rotation.
        softcap: Scores become softcap x tanh(score / softcap); None for none.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope
    window: int | None = None
    qk_norm: bool = False
    softcap: float | None = None
    module: str = "self_attn"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer: its linears in the order of the forward pass, and all its norms.

    `activation` of the gate: `silu`, or `gelu_tanh` (GELU by its tanh approximation).
    """

    attention: Attention
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    activation: str

    def linear(self, role: str) -> Linear:
        return next(linear for linear in self.linears if linear.role == role)

    def norm(self, role: str) -> Norm | None:
        """The norm of this role; None if the layer has none there."""
        return next((norm for norm in self.norms if norm.role == role), None)

    def group(self, fused: str) -> tuple[Linear, ...]:
        """The linears that runtimes merge."""
        return tuple(linear for linear in self.linears if linear.fused == fused)

    @property
    def fused_mlp(self) -> bool:
        """Gate and up are rows of one stored module."""
        return self.linear("gate").module == self.linear("up").module

    @cached_property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """Stored module -> rows and columns of its weight."""
        sizes: dict[str, tuple[int, int]] = {}
        for linear in self.linears:
            rows, _ = sizes.get(linear.module, (0, 0))
            sizes[linear.module] = (rows + linear.rows, linear.columns)
        return sizes

    @property
    def widest_features(self) -> int:
        """Features of one token at the widest point: residual and norm, beside MLP or attention."""
        query, key = self.linear("q").rows, self.linear("k").rows
        widest = max(3 * self.linear("gate").rows, 2 * query + 2 * key)
        return 2 * self.linear("o").rows + widest

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor but scales: name without the layer's, and shape."""
        biased = {linear.module for linear in self.linears if linear.bias}
        for module, (rows, columns) in self.modules.items():
            yield f"{module}.weight", (rows, columns)
            if module in biased:
                yield f"{module}.bias", (rows,)
        for norm in self.norms:
            yield f"{norm.module}.weight", (norm.size,)


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every frequency divided by `factor` (position interpolation, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's change of the frequencies: long waves slowed by `factor`, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (arXiv:2402.13753): divisors of frequencies up to the original context, and beyond.

    `attention_factor` multiplies cosine and sine.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float

    def factors(self, context: int) -> tuple[float, ...]:
        """The divisors for an engine whose requests are at most `context` tokens long."""
        beyond = context > self.original_max_position_embeddings
        return self.long_factors if beyond else self.short_factors


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071, section 3.2): pairs that turn slowly are slowed by `factor`.

    Those that turn `beta_fast` times or more in the original context are kept, those that turn
    `beta_slow` times or less are slowed, the others blended; `truncate` moves these edges to whole
    pairs. `attention_factor` multiplies cosine and sine. Rotated queries at position p grow by
    1 + `query_beta` * ln(1 + floor(p / original)), Llama 4's scaling that Ministral 3 has, too.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int
    attention_factor: float
    truncate: bool
    query_beta: float = 0.0

    def query_factors(self, context: int) -> NDArray[np.float64]:
        """What multiplies the query of each position, [context]."""
        import numpy as np

        periods = np.arange(context) // self.original_max_position_embeddings
        return 1 + self.query_beta * np.log1p(periods)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding: base `theta`; `rotary_dim` leading elements of each head are rotated."""

    theta: float
    rotary_dim: int
    scaling: LinearScaling | Llama3Scaling | LongRopeScaling | YarnScaling | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only language model.

    Attributes:
        architecture: `architectures[0]` of config.json.
        max_position_embeddings: Longest context the model was trained for, tokens.
        norm_eps: Added to the mean square in every norm.
        norm_offset: Added to the weight of every norm, which Gemma stores as its distance from 1.
        embedding_scale: Multiplies the embedding, rounded to the activations' type first.
        tied: lm_head is the embedding, stored once.
        state_bytes: State of fixed size that one sequence holds beside its KV cache.
        config: The `config.json` that it was read from.
    """

    architecture: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    tied: bool
    layers: tuple[Layer, ...]
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    state_bytes: int = 0
    config: Mapping[str, Any] = field(compare=False, repr=False)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        return tuple(layer.attention.window for layer in self.layers)

    @property
    def window(self) -> int | None:
        """The shortest attention window of any layer; None where all see everything."""
        return min((window for window in self.windows if window is not None), default=None)

    @property
    def window_of_all(self) -> int | None:
        """As `window`, where every layer has one: up to it no layer hides anything."""
        return None if None in self.windows else self.window

    @property
    def short_rope_context(self) -> int | None:
        """Context up to which LongRoPE's short factors hold; None for another rotary embedding."""
        scalings = (layer.attention.rope.scaling for layer in self.layers)
        longrope = (one for one in scalings if isinstance(one, LongRopeScaling))
        return next((one.original_max_position_embeddings for one in longrope), None)

    def uniform_layer(self) -> Layer:
        """The layer that all are like; RecipeError where they differ."""
        if len(set(self.layers)) > 1:
            message = "mixes layers of different kinds, which this format does not build"
            raise RecipeError([not_built("layer_types", message)])
        return self.layers[0]

    @cached_property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """Full module name -> rows and columns, of every linear in the layers."""
        return {
            f"{layer_name(number)}.{module}": size
            for number, layer in enumerate(self.layers)
            for module, size in layer.modules.items()
        }

    def fused_modules(self) -> dict[str, tuple[str, ...]]:
        """Group that shares one weight scale, such as `model.layers.0.self_attn.qkv` -> modules.

        A group that is one stored module has one scale anyway, and is not listed.
        """
        groups: dict[str, dict[str, None]] = {}
        for number, layer in enumerate(self.layers):
            for linear in layer.linears:
                if linear.fused:
                    module = f"{layer_name(number)}.{linear.module}"
                    label = f"{module.rpartition('.')[0]}.{linear.fused}"
                    groups.setdefault(label, {})[module] = None
        return {label: tuple(parts) for label, parts in groups.items() if len(parts) > 1}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name and shape ([out, in]) of all but scales and a tied lm_head."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{EMBEDDING}.weight": (self.vocab_size, self.hidden_size)
        }
        for number, layer in enumerate(self.layers):
            shapes |= {f"{layer_name(number)}.{name}": size for name, size in layer.tensors()}
        shapes[f"{FINAL_NORM}.weight"] = (self.hidden_size,)
        if not self.tied:
            shapes[f"{LM_HEAD}.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def kv_scales(self) -> tuple[str, ...]:
        """The scales of an FP8 KV cache: two for each attention, named as ModelOpt names them."""
        return tuple(
            f"{layer_name(number)}.{layer.attention.module}.{part}_proj.{part}_scale"
            for number, layer in enumerate(self.layers)
            for part in "kv"
        )

    @cached_property
    def params(self) -> int:
        """All parameters, a tied embedding counted once."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    @cached_property
    def linear_params(self) -> int:
        """Weights of all layers' linears, biases not counted: what quantization makes smaller."""
        return sum(rows * columns for rows, columns in self.modules.values())

    @property
    def embedding_params(self) -> int:
        """Weights of the token embedding; lm_head has as many, or shares them when tied."""
        return self.vocab_size * self.hidden_size

    def params_read(self, batch: int) -> int:
        """Parameters that one decode step reads: all, but of the embedding a row per sequence."""
        table = 0 if self.tied else self.embedding_params
        return self.params - table + batch * self.hidden_size

    def kv_bytes(self, tokens: int, bytes_per_element: int) -> int:
        """Cache of one sequence of so many tokens: keys and values of all layers, whole."""
        width = sum(layer.attention.kv_heads * layer.attention.head_dim for layer in self.layers)
        return 2 * tokens * width * bytes_per_element

    def to_json(self) -> dict[str, Any]:
        """All that the forward pass depends on."""
        return {key: value for key, value in asdict(self).items() if key != "config"}


def layer_name(number: int) -> str:
    """Transformers' name of a decoder layer."""
    return f"model.layers.{number}"


def not_built(key: str, message: str) -> Fault:
    """A key whose value a converter cannot express."""
    advice = "use compiler=checkpoint, which leaves the model as it is"
    return Fault(f"config.json: {key}", f"{message}; {advice}")


def longrope_gain(ratio: float, original: int) -> float:
    """LongRoPE's attention factor: sqrt(1 + ln(ratio) / ln(original)), 1 for a ratio up to 1.

    `ratio` is the longest context over the original one (arXiv:2402.13753, section 3.3).
    """
    return math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 < original else 1.0


def rope_tables(rope: Rope, *, context: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosine and sine, each [context, rotary_dim / 2], of the angles p * f_i.

    The graph pairs element i with i + rotary_dim / 2, as Hugging Face models do (`interleaved=0` of
    the ONNX operator), not with its neighbour as RoFormer does.
    """
    import numpy as np

    gain = getattr(rope.scaling, "attention_factor", 1.0)
    positions = np.arange(context, dtype=np.float64)
    angles = np.outer(positions, rope_frequencies(rope, context=context))
    return np.cos(angles) * gain, np.sin(angles) * gain


def rope_frequencies(rope: Rope, *, context: int) -> NDArray[np.float64]:
    """Radians that pair i turns from one token to the next, [rotary_dim / 2].

    theta^(-2i / rotary_dim) before scaling (RoFormer, arXiv:2104.09864, section 3.4.2). LongRoPE:
    Transformers picks the factors by the longest row of a pass; a static graph by its context.
    """
    import numpy as np

    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim
    frequencies: NDArray[np.float64] = rope.theta**-exponents
    scaling = rope.scaling
    if isinstance(scaling, Llama3Scaling):  # `apply_scaling` in Meta's reference of Llama 3.1
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    elif isinstance(scaling, LinearScaling):
        frequencies = frequencies / scaling.factor
    elif isinstance(scaling, YarnScaling):
        kept = _yarn_kept(rope.theta, rope.rotary_dim, scaling)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    elif isinstance(scaling, LongRopeScaling):
        frequencies = frequencies / np.array(scaling.factors(context))
    return frequencies


def _yarn_kept(theta: float, rotary_dim: int, scaling: YarnScaling) -> NDArray[np.float64]:
    """Share of each pair's own frequency that it keeps, [rotary_dim / 2]."""
    import numpy as np

    def pair(turns: float) -> float:
        """The pair, a fraction, that turns so often in the original context."""
        wave = scaling.original_max_position_embeddings / (2 * math.pi * turns)
        return rotary_dim * math.log(wave) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low or 0.001  # as in Transformers
    ramp = (np.arange(rotary_dim // 2) - low) / width
    kept: NDArray[np.float64] = 1 - np.clip(ramp, 0.0, 1.0)
    return kept
