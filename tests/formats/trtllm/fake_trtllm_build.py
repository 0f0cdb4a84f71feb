"""Stands in for `trtllm-build` 1.2.1 in tests: checks what it is given, writes what it would write.

It knows the options from `trtllm_build_options.json` beside it, the checkpoint's config keys, and
the rules by which the real one changes values (facts: builder.py and _common.py of the 1.2 line).
`$FAKE_TRTLLM` makes it misbehave:

    hang                       never end, deaf to SIGTERM
    oom                        take memory until it is killed
    kill                       end by SIGKILL
    say:TEXT                   print TEXT and exit 1
    set:PATH=JSON              write another effective value than it should
    without:rank0.engine       do not write a file
    timings:                   write an empty timing cache; with `-` none at all
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

OPTIONS = json.loads(Path(__file__).with_name("trtllm_build_options.json").read_text())["options"]
REQUIRED = ("architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads")
NO_SILENT_DEFAULT = ("rotary_base", "position_embedding_type", "head_size", "norm_epsilon")
ARCHITECTURES = {
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
}
DEFAULTS = {
    "--output_dir": "engine_outputs",
    "--max_batch_size": "2048",
    "--max_num_tokens": "8192",
    "--max_beam_width": "1",
    "--context_fmha": "enable",
    "--remove_input_padding": "enable",
    "--use_paged_context_fmha": "enable",
    "--use_fp8_context_fmha": "enable",
    "--use_fused_mlp": "enable",
    "--multiple_profiles": "disable",
    "--tokens_per_block": "32",
    "--output_timing_cache": "model.cache",
}
SM = 89


def usage(message: str) -> None:
    """End as argparse does."""
    print("usage: trtllm-build [-h] ...", file=sys.stderr)
    print(f"trtllm-build: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse(arguments: list[str]) -> dict[str, Any]:
    """Options by name; anything that the real parser would not take ends the program."""
    found: dict[str, Any] = dict(DEFAULTS)
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        if name not in OPTIONS:
            usage(f"unrecognized arguments: {name}")
        kind = OPTIONS[name]
        if kind.get("type") == "switch":
            found[name] = True
            continue
        if not rest or rest[0].startswith("--"):
            usage(f"argument {name}: expected one argument")
        value = rest.pop(0)
        if "choices" in kind and value not in kind["choices"]:
            usage(f"argument {name}: invalid choice: {value!r}")
        if kind.get("type") == "int" and not value.lstrip("-").isdigit():
            usage(f"argument {name}: invalid int value: {value!r}")
        found[name] = value
    return found


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Load the config; the tensors are held against it by the conversion's own tests."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    for key in REQUIRED:
        if key not in config:
            fail(f"KeyError: '{key}'")
    if config["architecture"] not in ARCHITECTURES:
        fail(f"AssertionError: Unsupported model architecture: {config['architecture']}")
    # The real one says nothing and builds a wrong engine.
    if missing := [key for key in NO_SILENT_DEFAULT if key not in config]:
        fail(f"checkpoint leaves {missing} to a silent default")
    return config


def effective_build(options: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """`build_config` after the checks that change values and only warn."""

    def on(name: str) -> bool:
        return bool(options[f"--{name}"] == "enable")

    def number(name: str) -> int | None:
        value = options.get(f"--{name}")
        return None if value is None else int(value)

    def plugin(name: str) -> str | None:
        value = options.get(f"--{name}", "disable")
        return None if value == "disable" else value

    if on("multiple_profiles") and number("opt_num_tokens") is not None:
        fail("RuntimeError: multiple_profiles is enabled, while opt_num_tokens is set.")
    quantization = config.get("quantization", {})
    fp8 = quantization.get("quant_algo") == "FP8"
    fp8_cache = quantization.get("kv_cache_quant_algo") == "FP8"
    paged, fp8_fmha = on("use_paged_context_fmha"), on("use_fp8_context_fmha")
    if not on("context_fmha"):
        paged = fp8_fmha = False
    elif not fp8:
        fp8_fmha = False
        paged = paged and not fp8_cache
    elif paged and fp8_fmha != fp8_cache:
        print(f"[TRT-LLM] [W] FP8 Context FMHA is {'enabled' if fp8_cache else 'disabled'}")
        fp8_fmha = fp8_cache
    batch, sequence = number("max_batch_size") or 0, number("max_seq_len")
    if sequence is None:
        sequence = config.get("max_position_embeddings") or 2048
    block = number("tokens_per_block") or 0
    tokens = max(min(number("max_num_tokens") or 0, sequence * batch), block)
    opt_tokens = number("opt_num_tokens")
    if opt_tokens is None and not on("multiple_profiles"):
        opt_tokens = min(batch, tokens)
    return {
        "max_input_len": min(1024, sequence),
        "max_seq_len": sequence,
        "opt_batch_size": 8,
        "max_batch_size": batch,
        "max_beam_width": number("max_beam_width"),
        "max_num_tokens": tokens,
        "opt_num_tokens": opt_tokens,
        "kv_cache_type": "PAGED",
        "gather_context_logits": False,
        "strongly_typed": True,
        "speculative_decoding_mode": 1,
        "input_timing_cache": options.get("--input_timing_cache"),
        "output_timing_cache": options["--output_timing_cache"],
        "plugin_config": {
            "dtype": config["dtype"],
            "gpt_attention_plugin": "auto",
            "gemm_plugin": plugin("gemm_plugin"),
            "context_fmha": on("context_fmha"),
            "remove_input_padding": on("remove_input_padding"),
            "paged_kv_cache": True,
            "tokens_per_block": block,
            "use_paged_context_fmha": paged,
            "use_fp8_context_fmha": fp8_fmha,
            "use_fused_mlp": on("use_fused_mlp"),
            "multiple_profiles": on("multiple_profiles"),
        },
    }


def write_timing_cache(options: dict[str, Any]) -> None:
    """One more entry than the cache that was lent."""
    known = b""
    if (name := options.get("--input_timing_cache")) is not None:
        if not Path(name).is_file():
            fail("a timing cache was named that does not exist")
        known = Path(name).read_bytes()
    Path(options["--output_timing_cache"]).write_bytes(known + b"entry\n")


def misbehave(behaviour: str) -> None:
    """What `$FAKE_TRTLLM` asks for before anything is written."""
    kind, _, text = behaviour.partition(":")
    if kind == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "oom":
        taken = []
        while True:
            taken.append(bytearray(os.urandom(1 << 20)) * 8)
    if kind == "say":
        fail(text)


def fail(message: str) -> None:
    print(f"Traceback (most recent call last):\n{message}", flush=True)
    sys.exit(1)


def main() -> None:
    options = parse(sys.argv[1:])
    behaviour = os.environ.get("FAKE_TRTLLM", "")
    print("[TensorRT-LLM] TensorRT LLM version: 1.2.1")
    for name in ("HOME", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE"):
        print(f"{name}={os.environ.get(name)}")
    Path(os.environ["HOME"], "written").write_text("as the real one's caches\n")
    config = check_checkpoint(Path(options["--checkpoint_dir"]))
    output = Path(options["--output_dir"])
    output.mkdir(exist_ok=True)
    sys.stdout.flush()
    misbehave(behaviour)
    pretrained = {**config, "mapping": {**config.get("mapping", {}), "gpus_per_node": 8}}
    engine_config = {
        "version": "1.2.1",
        "pretrained_config": pretrained,
        "build_config": effective_build(options, config),
    }
    kind, _, text = behaviour.partition(":")
    if kind == "set":
        path, _, value = text.partition("=")
        node: dict[str, Any] = engine_config
        *parents, last = path.split(".")
        for part in parents:
            node = node[part]
        node[last] = json.loads(value)
    (output / "config.json").write_text(json.dumps(engine_config, indent=4))
    if behaviour != "without:rank0.engine":
        (output / "rank0.engine").write_bytes(b"ftrt" + bytes(4096))
    if kind == "timings":
        if not text:
            Path(options["--output_timing_cache"]).touch()
    else:
        write_timing_cache(options)


if __name__ == "__main__":
    main()
