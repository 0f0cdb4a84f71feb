"""A Hugging Face folder with random weights: `config.json`, safetensors shards, a tokenizer.

The weights are random numbers and of no use; everything that is made of them says so. They are
written tensor by tensor, so that a model of full size needs no memory to speak of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.safetensors_files import INDEX, TensorSpec, safetensors_header
from pipeline.model.spec import EMBEDDING, ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SHARD_BYTES = 2 << 30
_CHUNK = 1 << 22
BOS, EOS = "<|im_start|>", "<|im_end|>"
_CHAT = (
    "{% for message in messages %}" + BOS + "{{ message['role'] }}\n"
    "{{ message['content'] }}" + EOS + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + BOS + "assistant\n{% endif %}"
)


def write_random_model(spec: ModelSpec, folder: Path, *, documents: list[str], seed: int) -> None:
    """Write a model of this spec into `folder`, which must exist.

    Args:
        spec: Its config and tensors.
        folder: Gets the files.
        documents: Text that the tokenizer is trained on.
        seed: Of the weights; the same seed gives the same bytes.
    """
    tokens = _write_tokenizer(folder, documents, spec.vocab_size)
    config = {**spec.config, "torch_dtype": "bfloat16", **tokens}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(tokens) + "\n")
    (folder / "LICENSE").write_text("Random weights, in the public domain (CC0-1.0).\n")
    tensors = [TensorSpec(name, "bfloat16", shape) for name, shape in spec.tensors().items()]
    _write_shards(tensors, folder, seed)


def _write_shards(tensors: list[TensorSpec], folder: Path, seed: int) -> None:
    """Write safetensors of about 2 GiB each, and their index."""
    import numpy as np

    rng = np.random.default_rng(seed)
    shards: list[list[TensorSpec]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.size_bytes for t in shards[-1]) + tensor.size_bytes > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        with (folder / name).open("wb") as stream:
            stream.write(safetensors_header(shard, {"format": "pt"}))
            for tensor in shard:
                for values in _values(tensor, rng):
                    stream.write(values.tobytes())
    size_bytes = sum(tensor.size_bytes for tensor in tensors)
    index = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index) + "\n")


def _values(tensor: TensorSpec, rng: np.random.Generator) -> Iterator[NDArray[Any]]:
    """The tensor's elements as bfloat16, piece by piece.

    Linears get the standard deviation 1 / sqrt(inputs), which keeps activations near unit size at
    any depth; norms and biases are random too, so that one that is left out shows.
    """
    import ml_dtypes
    import numpy as np

    mean, deviation = 0.0, 1.0
    if tensor.name.endswith(".bias"):
        deviation = 0.3
    elif len(tensor.shape) == 1:
        mean, deviation = 1.0, 0.1
    elif tensor.name != f"{EMBEDDING}.weight":
        deviation = tensor.shape[1] ** -0.5
    count = math.prod(tensor.shape)
    for start in range(0, count, _CHUNK):
        drawn = rng.standard_normal(min(_CHUNK, count - start), dtype=np.float32)
        yield (drawn * deviation + mean).astype(ml_dtypes.bfloat16)


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
