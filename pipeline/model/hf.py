"""Hugging Face folders: loads models and tokenizers from them, and writes random ones.

Loading is quiet, offline and without remote code. A folder means the same under Transformers 4,
which the build image pins, and under Transformers 5: same rotary table, same tokens. The weights of
a random model are of no use; everything that is made of them says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import resource
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import CorruptError, IncompatibleError
from pipeline.core.safetensors_files import INDEX, TensorSpec, safetensors_header
from pipeline.model.read import load_config
from pipeline.model.spec import EMBEDDING, ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

_SHARD_BYTES = 2 << 30
_CHUNK = 1 << 22
_TEMPLATE_S, _TEMPLATE_BYTES, _TEMPLATE_CHARS = 5.0, 512 << 20, 1 << 20
"""Most that a chat template may take; one of a large model takes 20 ms and writes a page."""
BOS, EOS = "<|im_start|>", "<|im_end|>"
_CHAT = (
    "{% for message in messages %}" + BOS + "{{ message['role'] }}\n"
    "{{ message['content'] }}" + EOS + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + BOS + "assistant\n{% endif %}"
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries that print to stdout and warn about their own internals write to our debug log."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    logging.getLogger("modelopt").setLevel(logging.ERROR)
    captured = StringIO()
    try:
        with contextlib.redirect_stdout(captured), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for line in captured.getvalue().splitlines():
            log.debug("%s", line)


@cache
def use_onednn() -> None:
    """From now on oneDNN computes this process's float32 linears on a CPU.

    MKL, which torch takes, uses AVX-512 on Intel's processors alone: on one core of an AMD EPYC of
    2025 it does 100 GFLOP/s and oneDNN 215, with AVX2 100 and 114 (2026-11-30). For inference only.
    """
    import torch

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        if x.dtype == weight.dtype == torch.float32 and x.numel():
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return torch.ops.aten.linear.default.decompose(x, weight, bias)

    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        torch.library.impl("aten::linear", "cpu", linear)


def load_model(folder: Path, dtype: str) -> Any:
    """A causal language model in evaluation mode, on the CPU; `dtype` names one of torch."""
    import torch
    from transformers import AutoModelForCausalLM

    use_onednn()
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=_config(folder),
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, as its `tokenizer.json` states it where there is one.

    `AutoTokenizer` would choose a class by the model's type; since Transformers 5 some of these
    rebuild the tokenizer: a model of type qwen2 gets Qwen's splitting whatever its file says.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    as_stated = (folder / "tokenizer.json").is_file()
    loader = PreTrainedTokenizerFast if as_stated else AutoTokenizer
    try:
        with quiet():
            return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library has no class of its own for a broken file
        raise CorruptError(f"{folder}: its tokenizer is damaged: {error!s:.300}") from error


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...] | None:
    """Token ids up to where the answer starts; None if the template refuses the conversation."""
    text = chat_text(tokenizer, messages, add_generation_prompt=True) or ""
    return tuple(map(int, tokenizer(text, add_special_tokens=False)["input_ids"])) or None


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: bool) -> str | None:
    """As the chat template writes it; None if that refuses it. In the main thread only.

    It is a program by the author of the model: CorruptError where it takes too much.
    """

    def stop(*_: object) -> None:
        raise SystemExit  # Jinja catches every `Exception` of a constant, and goes on

    where, text = f"{tokenizer.name_or_path}: its chat template", str(tokenizer.chat_template)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = min(most + _TEMPLATE_BYTES, *(limit for limit in limits if limit >= 0), sys.maxsize)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
        try:
            signal.setitimer(signal.ITIMER_REAL, _TEMPLATE_S)
            if len(text) <= _TEMPLATE_CHARS:
                text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        finally:  # a timer that ends just here is caught below like any other
            signal.setitimer(signal.ITIMER_REAL, 0)
        if len(text) <= _TEMPLATE_CHARS:
            return text
    except (MemoryError, SystemExit):
        text = ""
    except Exception as error:  # a template may fail in any way that Python can
        log.debug("%s refuses a conversation: %s", where, error)
        return None
    finally:
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    mib = _TEMPLATE_BYTES >> 20
    raise CorruptError(f"{where} takes more than {_TEMPLATE_S:.0f} s, {mib} MiB or a text of 1 MB")


def _config(folder: Path) -> Any:
    """The folder's config as the installed Transformers understands it."""
    import transformers

    raw = load_config(folder)
    if raw.get("model_type") not in transformers.CONFIG_MAPPING:
        known = f"Transformers {transformers.__version__} does not know {raw.get('model_type')!r}"
        raise IncompatibleError(f"{known}; build this model where a newer one is installed")
    if "rope_parameters" in raw and int(transformers.__version__.split(".")[0]) < 5:
        spelled = transformers4_spelling(raw)
        return transformers.AutoConfig.for_model(spelled.pop("model_type"), **spelled)
    return transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )


def transformers4_spelling(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` that Transformers 5 wrote, as Transformers 4 reads it.

    Version 5 keeps all rotary settings in `rope_parameters`. Version 4 does not know that key and
    takes its default theta instead, without a word. (The reverse needs nothing: 5 reads both.)
    """
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    rope = dict(config.get("rope_parameters") or {})
    if "sliding_attention" in rope:  # Gemma 3's two sections
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    legacy_type = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", legacy_type)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            old[name] = rope.pop(name)
    if rope_type == "longrope":
        # Version 4's Phi3Config accepts these three keys and no other.
        if "original_max_position_embeddings" in rope:
            old["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        factors = {name: rope[name] for name in ("short_factor", "long_factor")}
        old["rope_scaling"] = {"type": "longrope", **factors}
    elif rope_type != "default":
        old["rope_scaling"] = {"rope_type": rope_type, **rope}
    return old


def write_random_model(spec: ModelSpec, folder: Path, *, documents: list[str], seed: int) -> None:
    """Write a model of this spec into `folder`, tensor by tensor: full size needs little memory.

    The tokenizer is trained on `documents`; the same seed gives the same bytes.
    """
    tokens = _write_tokenizer(folder, documents, spec.vocab_size)
    config = {**spec.config, "torch_dtype": "bfloat16", **tokens}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(tokens) + "\n")
    (folder / "LICENSE").write_text("Random weights, in the public domain (CC0-1.0).\n")
    tensors = [TensorSpec(name, "bfloat16", shape) for name, shape in spec.tensors().items()]
    _write_shards(tensors, folder, seed, mean_norm=1 - spec.norm_offset)


def _write_shards(tensors: list[TensorSpec], folder: Path, seed: int, mean_norm: float) -> None:
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
                for values in _values(tensor, rng, mean_norm):
                    stream.write(values.tobytes())
    size_bytes = sum(tensor.size_bytes for tensor in tensors)
    index = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index) + "\n")


def _values(
    tensor: TensorSpec, rng: np.random.Generator, mean_norm: float
) -> Iterator[NDArray[Any]]:
    """The tensor's elements as bfloat16, piece by piece.

    Linears have the standard deviation 1 / sqrt(inputs), which keeps activations near unit size;
    norms and biases are random too, so that one that is left out shows.
    """
    import ml_dtypes
    import numpy as np

    mean, deviation = 0.0, 1.0
    if tensor.name.endswith(".bias"):
        deviation = 0.3
    elif len(tensor.shape) == 1:
        mean, deviation = mean_norm, 0.1
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
