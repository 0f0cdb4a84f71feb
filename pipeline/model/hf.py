"""Loads Transformers models and tokenizers from a folder: quietly, offline, without remote code.

A folder means the same under Transformers 4, which the build image pins, and under Transformers 5:
same rotary table, same tokens.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from pipeline.model.read import load_config

log = logging.getLogger(__name__)


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


def load_model(folder: Path, dtype: str) -> Any:
    """A causal language model in evaluation mode, on the CPU.

    Args:
        folder: Hugging Face folder with safetensors.
        dtype: Name of a torch dtype, such as `float32`.
    """
    import torch
    from transformers import AutoModelForCausalLM

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

    `AutoTokenizer` chooses a class by the model's type, and since Transformers 5 some of these
    classes rebuild the tokenizer with rules of their own: a model of type qwen2 gets Qwen's
    splitting whatever its file says.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    as_stated = (folder / "tokenizer.json").is_file()
    loader = PreTrainedTokenizerFast if as_stated else AutoTokenizer
    with quiet():
        return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _config(folder: Path) -> Any:
    """The folder's config as the installed Transformers understands it."""
    import transformers

    raw = load_config(folder)
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

    Args:
        config: With or without `rope_parameters`.
    """
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    rope = dict(config.get("rope_parameters") or {})
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
