"""Which Hugging Face linears make up each of TensorRT-LLM's, and in which order of rows.

| TensorRT-LLM | Llama, Mistral, Qwen2 | Phi-3 |
| --- | --- | --- |
| `attention.qkv` | q_proj, k_proj, v_proj on top of each other | qkv_proj, as it is |
| `attention.dense` | o_proj | o_proj |
| `mlp.fc` | gate_proj | gate_up_proj, halves swapped: up, then gate |
| `mlp.gate` | up_proj | |
| `mlp.proj` | down_proj | down_proj |

Sources in NVIDIA/TensorRT-LLM: `models/model_weights_loader.py` (index number 503652548) for the
names, `models/phi3/convert.py` (89fd9b74) for the halves. They are swapped since the activation
`swiglu` lets the second half of its input gate the first.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.model.decoder_config import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear of TensorRT-LLM.

    Attributes:
        target: Its name there.
        parts: Source modules with the rows (output features) of each, top to bottom.
        columns: Input features.
        sharing: Source modules that must have one weight scale, which the runtime fuses.
        bias: Whether the parts have biases.
        halves_swapped: The second half of the rows comes first.
    """

    target: str
    parts: tuple[tuple[str, int], ...]
    columns: int
    sharing: tuple[str, ...]
    bias: bool = False
    halves_swapped: bool = False

    def ordered_rows(self) -> tuple[tuple[str, tuple[int, int] | None], ...]:
        """Source modules with the range of rows to take, None for all, in the target's order."""
        if not self.halves_swapped:
            return tuple((module, None) for module, _ in self.parts)
        return tuple(
            (module, rows)
            for module, count in self.parts
            for rows in ((count // 2, count), (0, count // 2))
        )


def layer_linears(config: DecoderConfig, layer: int) -> tuple[Linear, ...]:
    """The linears of one decoder layer, attention first."""
    target = f"transformer.layers.{layer}"
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size

    def one(name: str, module: str, rows: int, columns: int) -> Linear:
        return Linear(
            target=f"{target}.{name}",
            parts=((module, rows),),
            columns=columns,
            sharing=(module,),
        )

    dense = one("attention.dense", f"{attention}.o_proj", hidden, query)
    down = one("mlp.proj", f"{mlp}.down_proj", hidden, inner)
    if config.fused:
        gate_up = f"{mlp}.gate_up_proj"
        return (
            one("attention.qkv", f"{attention}.qkv_proj", query + 2 * key, hidden),
            dense,
            Linear(
                target=f"{target}.mlp.fc",
                parts=((gate_up, 2 * inner),),
                columns=hidden,
                sharing=(gate_up,),
                halves_swapped=True,
            ),
            down,
        )
    q, k, v = (f"{attention}.{part}_proj" for part in ("q", "k", "v"))
    gate, up = f"{mlp}.gate_proj", f"{mlp}.up_proj"
    return (
        Linear(
            target=f"{target}.attention.qkv",
            parts=((q, query), (k, key), (v, key)),
            columns=hidden,
            sharing=(q, k, v),
            bias=config.attention_bias,
        ),
        dense,
        *(
            Linear(
                target=f"{target}.mlp.{name}",
                parts=((module, inner),),
                columns=hidden,
                sharing=(gate, up),
            )
            for name, module in (("fc", gate), ("gate", up))
        ),
        down,
    )
