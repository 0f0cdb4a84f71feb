"""From a `config.json`, or the same keys in `recipes/shapes`, to a ModelSpec.

A key that a reader overlooks is an engine that is silently wrong. So families ask for keys by name
and type, and whatever was not asked for is a fault, as is each value of the wrong type or range;
all of them are reported together.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from pipeline.core.errors import Fault, RecipeError
from pipeline.core.settings import read_json_object
from pipeline.model import families
from pipeline.model.spec import ModelSpec

_MISSING: Any = object()
_T = TypeVar("_T")
_LARGEST = 1e300  # a JSON integer may be longer than any float

IRRELEVANT = frozenset(
    {
        # about files, training, outputs or other programs, not about the forward pass
        "_attn_implementation", "_attn_implementation_autoset", "_name_or_path",
        "attention_dropout", "auto_map", "bos_token_id", "dtype", "eos_token_id",
        "id2label", "initializer_range", "label2id", "output_attentions",
        "output_hidden_states", "pad_token_id", "problem_type", "quantization_config",
        "return_dict", "torch_dtype", "transformers.js_config",
        "transformers_version", "unk_token_id", "unsloth_fixed", "use_cache",
        # defaults of `generate`, from a time before generation_config.json, and base-class fields
        "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size",
        "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
        "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
        "output_scores", "prefix", "remove_invalid_values", "repetition_penalty",
        "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
        "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torchscript",
        "typical_p",
    }
)  # fmt: skip
REQUIRED: Mapping[str, Any] = {
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    # What Transformers 4 writes where a config is dumped whole.
    "add_cross_attention": False,
    "is_decoder": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
    "use_bfloat16": False,
}
"""Keys of every family that must have the one value that changes nothing, where they are stated."""


class ConfigKeys:
    """Reads typed values and collects faults; a faulty value has a stand-in, so reading goes on.

    Paths start with `section`, such as `rope_scaling.`; `read` holds effective values.
    """

    def __init__(self, config: Mapping[str, Any], section: str = "") -> None:
        self.config = config
        self.section = section
        self.faults: list[Fault] = []
        self.read: dict[str, Any] = {}
        self._known: set[str] = set()

    def fault(self, key: str, message: str) -> None:
        self.faults.append(Fault(self.section + key, message))

    def take(self, key: str, default: Any = _MISSING) -> Any:
        """The value as it is; null counts as absent. A fault where an absent one has no default."""
        self._known.add(key)
        value = self.config.get(key)
        if value is None:
            if default is _MISSING:
                self.fault(key, "is missing")
                return None
            value = default
        self.read[self.section + key] = value
        return value

    def integer(self, key: str, default: Any = _MISSING) -> int:
        """A whole number, 1 or more."""
        value = self.take(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value < _LARGEST:
            return value
        return self._wrong(key, value, "a whole number >= 1", 1)

    def optional_integer(self, key: str, *, absent: int | None) -> int | None:
        """As `integer`; a stated null is None, an absent key `absent`."""
        self._known.add(key)
        if key in self.config and self.config[key] is None:
            self.read[self.section + key] = None
            return None
        return None if key not in self.config and absent is None else self.integer(key, absent)

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A finite number above 0."""
        value = self.take(key, default)
        if _is_positive(value):
            return float(value)
        return self._wrong(key, value, "a number > 0", 1.0)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers above 0."""
        value = self.take(key)
        if isinstance(value, list) and all(_is_positive(one) for one in value):
            return tuple(float(one) for one in value)
        return self._wrong(key, value, "a list of numbers > 0", ())

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        return value if isinstance(value, bool) else self._wrong(key, value, "true or false", False)

    def section_of(self, key: str) -> Mapping[str, Any]:
        """A mapping; empty where it is absent."""
        value = self.take(key, {})
        return value if isinstance(value, Mapping) else self._wrong(key, value, "a section", {})

    def require(self, key: str, wanted: Any) -> None:
        """Demand one value where the key is stated."""
        self._known.add(key)
        value = self.config.get(key, wanted)
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            self.fault(key, f"is {value!r}; only {wanted!r} is built for this model type")

    def ignore(self, *keys: str) -> None:
        """Keys that leave the forward pass alone."""
        self._known.update(keys)

    def check_all_known(self) -> None:
        """A fault for each key that was neither read, required nor ignored."""
        for key in sorted(map(str, self.config.keys() - self._known)):
            self.fault(
                key,
                "is not known for this model type; if it leaves the forward pass alone, ignore it "
                "in pipeline/model/families, with the reason",
            )

    def raise_faults(self, where: str = "config.json: ") -> None:
        """Stop if anything is wrong: a RecipeError with every fault."""
        if self.faults:
            raise RecipeError([Fault(where + each.path, each.message) for each in self.faults])

    def _wrong(self, key: str, value: Any, wanted: str, stand_in: _T) -> _T:
        if value is not None:  # a missing one has its fault
            self.fault(key, f"is {_shorten(value)}; it must be {wanted}")
        return stand_in


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LARGEST


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def model_types() -> tuple[str, ...]:
    """The families that we have, by their file names."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(families.__path__)))


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a config; all that is wrong or not understood is one RecipeError, a fault each."""
    spec, keys = _read(config)
    keys.raise_faults()
    return spec


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a multimodal model's config says of its language model, as a config of its own.

    Any other config, and one whose language model has a type not known here, is given as it is.
    """
    text = config.get("text_config")
    if not isinstance(text, Mapping) or text.get("model_type") not in model_types():
        return config
    family = importlib.import_module(f"{families.__name__}.{text['model_type']}")
    return {**text, "architectures": [family.ARCHITECTURE]}


def load_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder; CorruptError if it is no JSON object."""
    return read_json_object(folder / "config.json")


def spec_faults(spec: ModelSpec, config: Mapping[str, Any]) -> list[Fault]:
    """Where a fetched `config.json` differs from the spec that the recipe planned with."""
    found = read_spec(config)
    if found == spec:
        return []
    planned_keys, found_keys = _read(spec.config)[1].read, _read(config)[1].read
    return [
        Fault(
            f"shape.{key}",
            f"the recipe plans with {planned_keys.get(key)}, the fetched config.json says "
            f"{found_keys.get(key)}; correct recipes/shapes or choose the right source",
        )
        for key in planned_keys | found_keys
        if planned_keys.get(key) != found_keys.get(key)
    ]


def _read(config: Mapping[str, Any]) -> tuple[ModelSpec, ConfigKeys]:
    """The spec, which counts only if the keys have no faults; RecipeError if too much is wrong."""
    keys = ConfigKeys(config := language_config(config))
    known = model_types()
    model_type = str(keys.take("model_type", "")).replace("-", "_").replace(".", "_")
    if model_type not in known:
        named = f"is {config['model_type']!r}" if config.get("model_type") else "is missing"
        advice = "choose such a model, or describe its type in pipeline/model/families"
        types = f"the model types that we read are {', '.join(known)}; {advice}"
        keys.fault("model_type", f"{named}; {types}")
        keys.raise_faults()
    family = importlib.import_module(f"{families.__name__}.{model_type}")
    architectures = keys.take("architectures", [])
    if architectures != [family.ARCHITECTURE]:
        wanted = [family.ARCHITECTURE]
        keys.fault("architectures", f"is {architectures!r}; a {model_type} model has {wanted!r}")
        keys.raise_faults()
    keys.ignore(*IRRELEVANT)
    for key, value in REQUIRED.items():
        keys.require(key, value)
    spec: ModelSpec = family.read(keys)
    keys.check_all_known()
    return spec, keys


def _validate(value: Any) -> Any:
    """A recipe's section as a spec; pydantic gets every fault at its key."""
    if not isinstance(value, Mapping):
        return value
    try:
        spec, keys = _read(value)
        keys.raise_faults("")
    except RecipeError as error:
        raise ValidationError.from_exception_data(
            "shape",
            [
                InitErrorDetails(
                    type=PydanticCustomError("value_error", "{error}", {"error": fault.message}),
                    loc=tuple(fault.path.removeprefix("config.json: ").split(".")),
                    input=value,
                )
                for fault in error.faults
            ],
        ) from error
    return spec


Shape = Annotated[ModelSpec, BeforeValidator(_validate)]
"""A field of a recipe that holds the keys of a `config.json`."""
