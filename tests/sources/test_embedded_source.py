"""The embedded source: a package that carries a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline
from pipeline.core.errors import ExitCode, NotFoundError
from pipeline.core.values import Weights
from pipeline.outcome import failure_of
from pipeline.sources.embedded import EmbeddedSource
from tests.tiny_recipe import ROOT, run_python

GGUF = b"GGUF" + bytes(2000)
CONF = Path(pipeline.__file__).parent.parent / "conf" / "source" / "embedded.yaml"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes | None], None]:
    """Installs a package `carrier` whose import fails, with this GGUF file or with none."""

    def write(content: bytes | None) -> None:
        package = tmp_path / "site" / "carrier"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise AssertionError('imported')\n")
        if content is not None:
            (package / "tiny.gguf").write_bytes(content)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    return write


def source(**changes: str) -> EmbeddedSource:
    settings: dict[str, Any] = {
        "package": "carrier",
        "requirement": "car-rier==1.2",
        "file": "tiny.gguf",
        "sha256": hashlib.sha256(GGUF).hexdigest(),
        "licence": "Apache-2.0",
    }
    return EmbeddedSource(**{**settings, **changes})


def configured() -> EmbeddedSource:
    settings: dict[str, Any] = yaml.safe_load(CONF.read_text())
    assert settings.pop("kind") == "embedded"
    return EmbeddedSource(**settings)


def test_package_without_its_metadata_has_no_licence(
    install: Callable[[bytes | None], None],
) -> None:
    install(GGUF)

    with pytest.raises(NotFoundError, match=r"the licence, is not installed"):
        source().fetch()


def test_missing_converter_names_the_extra(
    install: Callable[[bytes | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    install(GGUF)
    monkeypatch.setattr(importlib.metadata, "version", version)

    with pytest.raises(ModuleNotFoundError) as caught:
        source().fetch()
    assert failure_of(caught.value).exit_code is ExitCode.INCOMPATIBLE
    assert "this needs gguf" in failure_of(caught.value).message


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """The real package, really converted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINESMITH_CACHE", str(tmp_path_factory.mktemp("converted")))
        return configured().fetch()


def read_json(weights: Weights, name: str) -> Any:
    return json.loads((weights.dir / name).read_text())


@pytest.mark.slow
def test_converted_folder_says_what_the_model_is(converted: Weights) -> None:
    config = read_json(converted, "config.json")
    assert config["dtype"] == "bfloat16"
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000
    assert not [name for name in config if "name_or_path" in name]
    generation = read_json(converted, "generation_config.json")
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert converted.licence.files == ("LICENSE",)
    assert "4-bit" in converted.note
    assert "not the BF16 weights" in converted.note


@pytest.mark.slow
def test_converted_tokenizer_ends_turns_and_splits_digits(converted: Weights) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted.dir, local_files_only=True)

    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 1)
    assert tokenizer.model_max_length == 8192
    # Digits are cut off before byte-pair encoding, so the two line ends are one token.
    assert tokenizer.tokenize("\n\n2024") == ["ĊĊ", "2", "0", "2", "4"]
    assert tokenizer.decode(tokenizer("Yes , 3 .").input_ids) == "Yes , 3 ."
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.slow
def test_second_fetch_is_quick_and_loads_no_torch(converted: Weights) -> None:
    settings = {k: v for k, v in yaml.safe_load(CONF.read_text()).items() if k != "kind"}
    code = (
        "import sys, time; from pipeline.sources.embedded import EmbeddedSource as S;"
        f"s = S(**{settings!r}); t = time.perf_counter(); print(s.fetch().digest);"
        "print(time.perf_counter() - t < 1, [m for m in ('torch', 'gguf') if m in sys.modules])"
    )
    cache = converted.dir.parents[3].parent
    done = run_python(ROOT, "-c", code, ENGINESMITH_CACHE=str(cache))

    assert done.stdout.splitlines() == [converted.digest, "True []"]
