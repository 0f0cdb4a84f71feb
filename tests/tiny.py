"""A tiny random Llama with a byte-level tokenizer trained on the spot: real files, no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT = (
    "The engine reads the weights once for every token that it writes. "
    "A small model answers quickly; a large model answers well. "
    "Numbers such as 1, 23 and 456 are split into digits. "
)
VOCAB_SIZE = 320
EOS = "<|im_end|>"


def tiny_model(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write config, bfloat16 safetensors, tokenizer, chat template and licence into `folder`.

    Args:
        folder: Made when it is missing.
        seed: Of the random weights.
        overrides: Fields of `LlamaConfig`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rope_theta": 5000.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **overrides,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.config.architectures = ["LlamaForCausalLM"]
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("Apache License 2.0\n")
    return folder


def tiny_tokenizer() -> Any:
    """A byte-level BPE trained on `TEXT`, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token=EOS,
        pad_token=EOS,
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
            "{{ message['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    )
