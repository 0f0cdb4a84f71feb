"""What the converters understand of a `config.json`, and the refusal of everything else.

A key that a converter overlooks is an engine that is silently wrong. So each key is either read,
or demanded to have the one value that changes nothing, or known to be about something else; any
other key stops the build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pipeline.core.errors import Fault, RecipeError
from pipeline.model.rope import Rope, rope_of_config
from pipeline.model.shapes import Architecture, shape_of_config

_READ = frozenset(
    {
        "architectures", "attention_bias", "head_dim", "hidden_size", "intermediate_size",
        "layer_types", "max_position_embeddings", "max_window_layers", "num_attention_heads",
        "num_hidden_layers", "num_key_value_heads", "original_max_position_embeddings",
        "partial_rotary_factor", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
        "sliding_window", "tie_word_embeddings", "use_sliding_window", "vocab_size",
    }
)  # fmt: skip
_DEMANDED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "lm_head_bias": False,
    "pretraining_tp": 1,
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    # Phi-4-mini's config carries these two, always as 1.
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    # SmolLM2's conversion: neighbouring pairs, as Transformers does not have them.
    "rope_interleaved": False,
    # Qwen's vision models have it.
    "use_mrope": False,
    # What Transformers 4 writes where a config is dumped whole.
    "add_cross_attention": False,
    "is_decoder": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
    "use_bfloat16": False,
}
_IRRELEVANT = frozenset(
    {
        # about files, training, outputs or other programs, not about the forward pass
        "_attn_implementation", "_attn_implementation_autoset", "_name_or_path",
        "attention_dropout", "auto_map", "bos_token_id", "dtype", "embd_pdrop", "eos_token_id",
        "id2label", "initializer_range", "label2id", "model_type", "output_attentions",
        "output_hidden_states", "pad_token_id", "problem_type", "quantization_config",
        "resid_pdrop", "return_dict", "torch_dtype", "transformers.js_config",
        "transformers_version", "unk_token_id", "unsloth_fixed", "use_cache",
        # SmolLM2: a remark of the conversion that made it
        "is_llama_config",
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
_ROPE_KEYS = frozenset(
    {
        "attention_factor", "factor", "high_freq_factor", "long_factor", "low_freq_factor",
        "original_max_position_embeddings", "partial_rotary_factor", "rope_theta", "rope_type",
        "short_factor", "type",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A dense decoder as both converters build it.

    Attributes:
        architecture: `architectures[0]`.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Size of one head.
        vocab_size: Rows of the embedding.
        rms_norm_eps: Added to the mean square.
        rope: Rotary embedding.
        max_position_embeddings: Longest context, tokens.
        sliding_window: How many keys a query sees, its own included, in every layer; None for all.
        attention_bias: q, k and v have biases (o never has one).
        tied: lm_head is the embedding.
    """

    architecture: Architecture
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int
    sliding_window: int | None
    attention_bias: bool
    tied: bool

    @property
    def fused(self) -> bool:
        """Whether the checkpoint stores `qkv_proj` and `gate_up_proj` (Phi-3)."""
        return self.architecture == "Phi3ForCausalLM"

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Cache that one token of one sequence takes: keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_element

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model but scales: Hugging Face name and shape, [out, in] of a linear.

        Names as in Transformers' model classes; lm_head is missing where it is tied.
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
        if self.fused:
            layer["self_attn.qkv_proj.weight"] = (query + 2 * key, hidden)
            layer["mlp.gate_up_proj.weight"] = (2 * inner, hidden)
        else:
            for name, size in (("q", query), ("k", key), ("v", key)):
                layer[f"self_attn.{name}_proj.weight"] = (size, hidden)
                if self.attention_bias:
                    layer[f"self_attn.{name}_proj.bias"] = (size,)
            layer["mlp.gate_proj.weight"] = layer["mlp.up_proj.weight"] = (inner, hidden)
        layer["self_attn.o_proj.weight"] = (hidden, query)
        layer["mlp.down_proj.weight"] = (hidden, inner)
        layer["post_attention_layernorm.weight"] = (hidden,)
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden)
        }
        for number in range(self.num_layers):
            shapes |= {f"model.layers.{number}.{name}": size for name, size in layer.items()}
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    @staticmethod
    def from_json(config: Mapping[str, Any]) -> DecoderConfig:
        """Read a config.

        Raises:
            RecipeError: All that we do not understand or do not build, one fault a key.
        """
        shape = shape_of_config(config)
        faults = [*_key_faults(config), *_architecture_faults(shape, config)]
        try:
            rope = rope_of_config(config, theta=shape["rope_theta"], head_dim=shape["head_dim"])
        except KeyError as error:
            faults.append(_fault("rope_parameters", f"lacks {error.args[0]}"))
        except ValueError as error:
            faults.append(_fault("rope_parameters", str(error)))
        if faults:
            raise RecipeError(faults)
        return DecoderConfig(
            architecture=shape["architecture"],
            hidden_size=shape["hidden_size"],
            intermediate_size=shape["intermediate_size"],
            num_layers=shape["num_hidden_layers"],
            num_heads=shape["num_attention_heads"],
            num_kv_heads=shape["num_key_value_heads"],
            head_dim=shape["head_dim"],
            vocab_size=shape["vocab_size"],
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope=rope,
            max_position_embeddings=shape["max_position_embeddings"],
            sliding_window=shape["sliding_window"],
            attention_bias=shape["attention_bias"],
            tied=shape["tie_word_embeddings"],
        )


def _fault(key: str, message: str) -> Fault:
    return Fault(f"config.json: {key}", message)


def _key_faults(config: Mapping[str, Any]) -> list[Fault]:
    """Keys that are unknown, missing, or have a value that changes the forward pass."""
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                "intermediate_size", "max_position_embeddings", "rms_norm_eps")  # fmt: skip
    faults = [_fault(key, "is missing") for key in required if config.get(key) is None]
    faults += [
        _fault(key, f"is {config[key]!r}; the converters build {wanted!r} only")
        for key, wanted in _DEMANDED.items()
        if key in config and config[key] != wanted
    ]
    known = _READ | _DEMANDED.keys() | _IRRELEVANT
    faults += [
        _fault(
            key,
            "is not known to the converters; if it leaves the forward pass alone, add it to "
            "pipeline/model/decoder_config.py, with the reason",
        )
        for key in sorted(config.keys() - known)
    ]
    for section in ("rope_scaling", "rope_parameters"):
        unknown = sorted((config.get(section) or {}).keys() - _ROPE_KEYS)
        faults += [_fault(f"{section}.{key}", "is not known to the converters") for key in unknown]
    return faults


def _architecture_faults(shape: Mapping[str, Any], config: Mapping[str, Any]) -> list[Fault]:
    """An architecture that we do not build, and features that it does not have with us."""
    supported = get_args(Architecture)
    name = shape["architecture"]
    if name not in supported:
        return [_fault("architectures", f"is {name!r}; supported are {', '.join(supported)}")]
    faults = []
    if shape["attention_bias"] and name != "Qwen2ForCausalLM":
        # Llama's attention_bias puts one on o_proj as well.
        faults.append(_fault("attention_bias", f"is true; {name} is built without biases"))
    if not shape["attention_bias"] and name == "Qwen2ForCausalLM":
        faults.append(_fault("attention_bias", "is false; Qwen2's q, k and v have biases"))
    kinds = set(config.get("layer_types") or ())
    window = shape["sliding_window"] is not None
    if len(kinds) > 1 or kinds - {"sliding_attention" if window else "full_attention"}:
        faults.append(_fault("layer_types", f"is {sorted(kinds)}; all layers must be of one kind"))
    if window and name == "Qwen2ForCausalLM" and config.get("max_window_layers", 28) > 0:
        faults.append(_fault("max_window_layers", "mixes full and sliding layers; not built"))
    if name in ("MistralForCausalLM", "Qwen2ForCausalLM") and "num_key_value_heads" not in config:
        # Transformers fills in 8 and 32 (MistralConfig, Qwen2Config), not the number of heads.
        faults.append(_fault("num_key_value_heads", "is missing; state it"))
    if shape["head_dim"] and shape["num_attention_heads"] % max(shape["num_key_value_heads"], 1):
        faults.append(_fault("num_key_value_heads", "does not divide num_attention_heads"))
    return faults
