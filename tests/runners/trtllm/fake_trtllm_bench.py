"""Stands in for `trtllm-bench` 1.2.1 in tests: checks what it is given, writes a report.

`$FAKE_BENCH`: `say:TEXT` prints and exits 1, `no-report` ends well without one,
`set:PATH=JSON` reports another value.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

OPTIONS = json.loads(Path(__file__).with_name("trtllm_bench_options.json").read_text())


def refuse(message: str) -> None:
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(2)


def take(arguments: list[str], known: dict[str, Any]) -> dict[str, Any]:
    """Options at the front of the arguments, as click would take them."""
    found: dict[str, Any] = {}
    while arguments and arguments[0].startswith("-"):
        name = arguments.pop(0)
        if name not in known:
            refuse(f"No such option: {name}")
        kind = known[name]
        if kind.get("type") == "switch":
            found[name] = True
            continue
        value = arguments.pop(0) if arguments else ""
        if "choices" in kind and value not in kind["choices"]:
            refuse(f"Invalid value for {name}: {value}")
        if kind.get("type") == "int" and not value.lstrip("-").isdigit():
            refuse(f"Invalid value for {name}: {value!r} is not a valid integer")
        if kind.get("type") == "path" and not Path(value).exists():
            refuse(f"Invalid value for {name}: Path {value!r} does not exist")
        found[name] = value
    return found


def check_model(folder: Path) -> None:
    """What `initialize_tokenizer` and `ModelConfig.from_hf` read."""
    config = json.loads((folder / "config.json").read_text())
    for key in ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size"):
        if key not in config:
            refuse(f"config.json has no {key}")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    if "auto_map" in config or "auto_map" in tokenizer:
        refuse("auto_map names Python files that are not here")
    if not (folder / "tokenizer.json").is_file():
        refuse("no tokenizer")
    with (folder / "model.safetensors").open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    if not header:
        refuse("no parameters to count")


def main() -> None:
    arguments = sys.argv[1:]
    common = take(arguments, OPTIONS["global"])
    command = arguments.pop(0) if arguments else ""
    if command not in {"throughput", "latency"}:
        refuse(f"No such command {command!r}")
    given = take(arguments, OPTIONS[command])
    if arguments:
        refuse(f"Got unexpected extra arguments {arguments}")
    if given.get("--backend", "pytorch") != "tensorrt" or "--max_seq_len" in given:
        refuse("not the engine backend")
    check_model(Path(common["--model_path"]))
    Path(common["--workspace"]).mkdir(parents=True, exist_ok=True)
    behaviour, _, text = os.environ.get("FAKE_BENCH", "").partition(":")
    if behaviour == "say":
        print(text)
        sys.exit(1)
    engine = json.loads((Path(given["--engine_dir"]) / "config.json").read_text())
    build, quantization = engine["build_config"], engine["pretrained_config"]["quantization"]
    requests = [json.loads(line) for line in Path(given["--dataset"]).read_text().splitlines()]
    requests = requests[: int(given["--num_requests"]) or None]
    longest = max(len(item["input_ids"]) + item["output_tokens"] for item in requests)
    if longest > build["max_seq_len"]:
        refuse(f"Engine supports a max sequence of {build['max_seq_len']}")
    if "--extra_llm_api_options" in given:
        print("options", Path(given["--extra_llm_api_options"]).read_text())
    spread = {key: 5.0 for key in ("minimum", "maximum", "average", "p50", "p90", "p95", "p99")}
    count = len(requests)
    report: dict[str, Any] = {
        "engine": {
            "version": engine["version"],
            "backend": "TRT",
            "dtype": engine["pretrained_config"]["dtype"],
            "kv_cache_dtype": quantization["kv_cache_quant_algo"],
            "quantization": quantization["quant_algo"],
        },
        "world_info": {
            "world_size": 1,
            "max_batch_size": 1 if command == "latency" else build["max_batch_size"],
        },
        "request_info": {
            "num_requests": count,
            "avg_input_length": sum(len(item["input_ids"]) for item in requests) / count,
            "avg_output_length": sum(item["output_tokens"] for item in requests) / count,
        },
        "performance": {
            "system_output_throughput_tok_s": 400.0,
            "request_latency_percentiles_ms": spread,
        },
        "dataset": {"num_requests": count},
    }
    if command == "latency" or given.get("--streaming"):
        report["streaming_metrics"] = {
            "avg_ttft_ms": 20.0,
            "avg_tpot_ms": 9.5,
            "ttft_percentiles": spread,
            "tpot_percentiles": spread,
        }
    if behaviour == "set":
        path, _, value = text.partition("=")
        node = report
        *parents, last = path.split(".")
        for part in parents:
            node = node[part]
        node[last] = json.loads(value)
    print(
        "tokens",
        [item["input_ids"] for item in requests][:1],
        "ids",
        [item["task_id"] for item in requests],
    )
    if behaviour != "no-report":
        Path(given["--report_json"]).write_text(json.dumps(report, indent=4))


if __name__ == "__main__":
    main()
