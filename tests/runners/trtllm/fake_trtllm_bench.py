"""Stands in for `trtllm-bench` 1.2.1 in tests: checks what it is given, writes a report.

`$FAKE_BENCH`: `say:TEXT` prints and exits 1, `no-report` ends well without one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SWITCHES = {"--streaming"}


def refuse(message: str) -> None:
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(2)


def take(arguments: list[str]) -> dict[str, str]:
    """Options at the front of the arguments; test_bench.py compares them with the release's."""
    found = {}
    while arguments and arguments[0].startswith("-"):
        name = arguments.pop(0)
        found[name] = "" if name in SWITCHES else arguments.pop(0)
    return found


def check_model(folder: Path) -> None:
    """What `initialize_tokenizer` and `ModelConfig.from_hf` read."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    if "auto_map" in config or "auto_map" in tokenizer:
        refuse("auto_map names Python files that are not here")
    if not (folder / "tokenizer.json").is_file():
        refuse("no tokenizer")


def main() -> None:
    arguments = sys.argv[1:]
    common = take(arguments)
    command = arguments.pop(0)
    given = take(arguments)
    if arguments:
        refuse(f"Got unexpected extra arguments {arguments}")
    check_model(Path(common["--model_path"]))
    Path(common["--workspace"]).mkdir(parents=True, exist_ok=True)
    behaviour, _, text = os.environ.get("FAKE_BENCH", "").partition(":")
    if behaviour == "say":
        print(text)
        sys.exit(1)
    engine = json.loads((Path(given["--engine_dir"]) / "config.json").read_text())
    build = engine["build_config"]
    requests = [json.loads(line) for line in Path(given["--dataset"]).read_text().splitlines()]
    requests = requests[: int(given["--num_requests"]) or None]
    if "--extra_llm_api_options" in given:
        print("options", Path(given["--extra_llm_api_options"]).read_text())
    spread = {key: 5.0 for key in ("minimum", "p50", "p90", "p99")}
    count = len(requests)
    report: dict[str, Any] = {
        "engine": {
            "version": engine["version"],
            "backend": "TRT",
            "quantization": engine["pretrained_config"]["quantization"]["quant_algo"],
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
    }
    if command == "latency" or "--streaming" in given:
        report["streaming_metrics"] = {
            "avg_ttft_ms": 20.0,
            "avg_tpot_ms": 9.5,
            "ttft_percentiles": spread,
            "tpot_percentiles": spread,
        }
    if behaviour != "no-report":
        Path(given["--report_json"]).write_text(json.dumps(report, indent=4))


if __name__ == "__main__":
    main()
