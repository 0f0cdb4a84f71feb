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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.model import spec
from pipeline.model.spec import Layer, layer_name


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear of TensorRT-LLM.

    Attributes:
        target: Its name there.
        pieces: Source modules with the range of rows to take, top to bottom.
        stored: Source module -> rows that it stores.
        columns: Input features.
        sharing: Source modules that must have one weight scale, which the runtime fuses.
        bias: Whether the source modules have biases.
    """

    target: str
    pieces: tuple[tuple[str, tuple[int, int]], ...]
    stored: Mapping[str, int]
    columns: int
    sharing: tuple[str, ...]
    bias: bool

    @property
    def rows(self) -> int:
        """Output features."""
        return sum(end - start for _, (start, end) in self.pieces)


def layer_linears(layer: Layer, number: int) -> tuple[Linear, ...]:
    """The linears of one decoder layer, attention first."""
    target, source = f"transformer.layers.{number}", layer_name(number)

    def joined(name: str, parts: Sequence[spec.Linear]) -> Linear:
        fused = parts[0].fused
        sharing = layer.group(fused) if fused else parts
        return Linear(
            target=f"{target}.{name}",
            pieces=tuple(
                (f"{source}.{part.module}", (part.first_row, part.first_row + part.rows))
                for part in parts
            ),
            stored={f"{source}.{part.module}": layer.modules[part.module][0] for part in parts},
            columns=parts[0].columns,
            sharing=tuple(dict.fromkeys(f"{source}.{part.module}" for part in sharing)),
            bias=parts[0].bias,
        )

    def one(name: str, role: str) -> Linear:
        return joined(name, [layer.linear(role)])

    if layer.fused_mlp:
        mlp = [joined("mlp.fc", [layer.linear("up"), layer.linear("gate")])]
    else:
        mlp = [one("mlp.fc", "gate"), one("mlp.gate", "up")]
    qkv = joined("attention.qkv", layer.group("qkv"))
    return (qkv, one("attention.dense", "o"), *mlp, one("mlp.proj", "down"))
