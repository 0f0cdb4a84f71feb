"""A Hugging Face folder with random weights: `config.json`, safetensors shards, a tokenizer.

The weights are nobody's and of no use; everything that is made of them says so. They are written
tensor by tensor, so that a model of full size needs no memory to speak of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.safetensors_files import INDEX, TensorSpec, safetensors_header
from pipeline.model.shapes import ModelShape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Phi3ForCausalLM": "phi3",
}
_SHARD_BYTES = 2 << 30
_CHUNK = 1 << 22
BOS, EOS = "<|im_start|>", "<|im_end|>"
_CHAT = (
    "{% for message in messages %}" + BOS + "{{ message['role'] }}\n"
    "{{ message['content'] }}" + EOS + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + BOS + "assistant\n{% endif %}"
)


@dataclass(frozen=True)
class _Tensor:
    """One bfloat16 tensor; its values have mean `mean` and standard deviation `std`."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def count(self) -> int:
        """Number of elements."""
        rows, columns = (*self.shape, 1)[:2]
        return rows * columns

    @property
    def size_bytes(self) -> int:
        """Two bytes an element."""
        return 2 * self.count


def write_random_model(shape: ModelShape, folder: Path, *, documents: list[str], seed: int) -> None:
    """Write a model of this shape into `folder`, which must exist.

    Args:
        shape: Its shape.
        folder: Gets the files.
        documents: Text that the tokenizer is trained on.
        seed: Of the weights; the same seed gives the same bytes.
    """
    tokens = _write_tokenizer(folder, documents, shape.vocab_size)
    config = {**config_of_shape(shape), **tokens}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(tokens) + "\n")
    (folder / "LICENSE").write_text("Random weights, in the public domain (CC0-1.0).\n")
    _write_shards(list(_tensors(shape)), folder, seed)


def config_of_shape(shape: ModelShape) -> dict[str, Any]:
    """A `config.json` that `shape_of_config` reads back as the same shape."""
    config: dict[str, Any] = {
        "architectures": [shape.architecture],
        "model_type": _MODEL_TYPES[shape.architecture],
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.rope_theta,
        "rope_scaling": _rope_scaling(shape),
        "tie_word_embeddings": shape.tie_word_embeddings,
        "sliding_window": shape.sliding_window,
        "torch_dtype": "bfloat16",
    }
    if shape.architecture == "LlamaForCausalLM":
        del config["sliding_window"]
    if shape.architecture == "Qwen2ForCausalLM":
        config |= {"use_sliding_window": shape.sliding_window is not None, "max_window_layers": 0}
    if shape.original_max_position_embeddings is not None:
        config["original_max_position_embeddings"] = shape.original_max_position_embeddings
    return config


def _rope_scaling(shape: ModelShape) -> dict[str, Any] | None:
    """Scaling with plausible numbers; a shape says its kind only.

    llama3: the factors of Llama 3.1's config. longrope: factors that grow from 1, as Phi-3's do.
    """
    if shape.rope_type == "llama3":
        return {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": max(shape.max_position_embeddings // 16, 2),
        }
    if shape.rope_type == "longrope":
        frequencies = shape.head_dim // 2
        return {
            "type": "longrope",
            "short_factor": [1 + index / frequencies for index in range(frequencies)],
            "long_factor": [1 + 8 * index / frequencies for index in range(frequencies)],
        }
    return None


def _tensors(shape: ModelShape) -> Iterator[_Tensor]:
    """Every tensor by its Hugging Face name, in file order.

    Linears get the standard deviation 1 / sqrt(inputs), which keeps activations near unit size at
    any depth; norms and biases are random too, so that one that is left out shows.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query = shape.num_attention_heads * shape.head_dim
    key_value = shape.num_key_value_heads * shape.head_dim
    yield _Tensor("model.embed_tokens.weight", (shape.vocab_size, hidden), 0.0, 1.0)
    if shape.architecture == "Phi3ForCausalLM":
        linears = {
            "self_attn.qkv_proj": (query + 2 * key_value, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_up_proj": (2 * inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
    else:
        linears = {
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key_value, hidden),
            "self_attn.v_proj": (key_value, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, (outputs, inputs) in linears.items():
            yield _Tensor(f"{prefix}.{name}.weight", (outputs, inputs), 0.0, inputs**-0.5)
            if shape.attention_bias and name.endswith(("q_proj", "k_proj", "v_proj")):
                yield _Tensor(f"{prefix}.{name}.bias", (outputs,), 0.0, 0.3)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield _Tensor(f"{prefix}.{norm}.weight", (hidden,), 1.0, 0.1)
    yield _Tensor("model.norm.weight", (hidden,), 1.0, 0.1)
    if not shape.tie_word_embeddings:
        yield _Tensor("lm_head.weight", (shape.vocab_size, hidden), 0.0, hidden**-0.5)


def _write_shards(tensors: list[_Tensor], folder: Path, seed: int) -> None:
    """Write safetensors of about 2 GiB each, and their index."""
    import numpy as np

    rng = np.random.default_rng(seed)
    shards: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.size_bytes for t in shards[-1]) + tensor.size_bytes > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        described = (TensorSpec(one.name, "bfloat16", one.shape) for one in shard)
        with (folder / name).open("wb") as stream:
            stream.write(safetensors_header(described, {"format": "pt"}))
            for tensor in shard:
                for values in _values(tensor, rng):
                    stream.write(values.tobytes())
    index = {
        "metadata": {"total_size": sum(tensor.size_bytes for tensor in tensors)},
        "weight_map": {
            tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        },
    }
    (folder / INDEX).write_text(json.dumps(index) + "\n")


def _values(tensor: _Tensor, rng: np.random.Generator) -> Iterator[NDArray[Any]]:
    """The tensor's elements as bfloat16, piece by piece."""
    import ml_dtypes
    import numpy as np

    for start in range(0, tensor.count, _CHUNK):
        drawn = rng.standard_normal(min(_CHUNK, tensor.count - start), dtype=np.float32)
        yield (drawn * tensor.std + tensor.mean).astype(ml_dtypes.bfloat16)


def _write_tokenizer(folder: Path, documents: list[str], vocab_size: int) -> dict[str, int]:
    """Train a byte-level BPE on `documents`, at most 512 tokens; the ids of bos and eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(512, vocab_size),
        special_tokens=["<|endoftext|>", BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        chat_template=_CHAT,
    )
    wrapped.save_pretrained(folder)
    end = int(wrapped.eos_token_id)
    return {"bos_token_id": int(wrapped.bos_token_id), "eos_token_id": end, "pad_token_id": end}
