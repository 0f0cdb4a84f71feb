"""The network check as a program of its own: the parser may crash, and it prints to stderr.

    python -m pipeline.formats.trtrtx.network_check.child ARGS.json OUT.json

ARGS.json is what `child_arguments` returns; OUT.json appears only when the network passed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.formats.trtrtx.network_check.compare import check_network
from pipeline.formats.trtrtx.network_check.interface import DecoderInterface


def child_arguments(
    onnx_rtx: Path, onnx_cpu: Path, interface: DecoderInterface, seed: int = 0
) -> dict[str, Any]:
    """The arguments of `check_network` as JSON."""
    return {
        "onnx_rtx": str(onnx_rtx),
        "onnx_cpu": str(onnx_cpu),
        "interface": vars(interface),
        "seed": seed,
    }


def main(arguments_path: Path, result_path: Path) -> int:
    """Check one network; returns the exit code, with the reason on stderr."""
    arguments = json.loads(arguments_path.read_text())
    try:
        result = check_network(
            Path(arguments["onnx_rtx"]),
            Path(arguments["onnx_cpu"]),
            interface=DecoderInterface(**arguments["interface"]),
            seed=arguments["seed"],
        )
    except PipelineError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    result_path.write_text(json.dumps(result.to_json(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
