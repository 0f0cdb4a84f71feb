"""A recipe of the whole line for a tiny random model, and ways to run it as users do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tiny import tiny_model
from tests.warm import run_warm

ROOT = Path(__file__).parent.parent
RECIPE = """\
defaults:
  - build
  - shapes@shape: tiny
  - override source: local
  - _self_

name: tiny
version: 1.0.0
source: {{path: {model}, licence: Apache-2.0}}
calibration: {{calib_size: 2, seq_len: 64, batch_size: 2}}
quantizer: {{device: cpu}}
compiler: {{max_batch_size: 2, opt_batch_size: 1, max_prefill_batch_size: 1, max_seq_len: 128}}
acceptance:
  windows: 4
  window_tokens: 64
  max_perplexity_increase: 1000.0
  max_mean_kl_nats: 1000.0
  min_top1_agreement: 0.0
  chat: {{prompts: 8, max_new_tokens: 4, min_source_stops: 0}}
  repeats: 1
"""
SHAPE = """\
# The tiny random Llama of the tests.
architectures: [LlamaForCausalLM]
model_type: llama
hidden_size: 64
intermediate_size: 128
num_hidden_layers: 3
num_attention_heads: 4
num_key_value_heads: 2
vocab_size: 320
max_position_embeddings: 256
rms_norm_eps: 1.0e-6
rope_parameters: {rope_theta: 5000.0, rope_type: default}
tie_word_embeddings: true
"""
_HEAVY = ("accept", "build", "generate")  # they import PyTorch
_TIMEOUT_S = 240.0
CHECKPOINT = (
    "~compiler.opt_batch_size",
    "~compiler.max_prefill_batch_size",
    "compiler=checkpoint",
    "runner=transformers",
)
QUICK = (*CHECKPOINT, "acceptance.chat=null")
"""The smallest package, judged by the fewest questions."""


@dataclass(frozen=True)
class Workplace:
    """A folder to work in: recipes, a cache and, after a build, `artifacts`."""

    root: Path

    @property
    def recipes(self) -> Path:
        return self.root / "own"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def env(self) -> dict[str, str]:
        """For a command in this place: its own cache, two threads at most, no network."""
        inherited = {k: v for k, v in os.environ.items() if k not in {"GITHUB_OUTPUT", "HF_TOKEN"}}
        return {
            **inherited,
            "ENGINESMITH_CACHE": str(self.cache),
            "HOME": str(self.root),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
        }

    def command(self, *arguments: str) -> list[str]:
        """The command line of `enginesmith ARGUMENTS`."""
        return [sys.executable, "-m", "pipeline.cli", *arguments]

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """`enginesmith ARGUMENTS` in this place."""
        if arguments[0] in _HEAVY:
            return run_warm(arguments, cwd=self.root, env={**self.env, **env}, timeout_s=_TIMEOUT_S)
        return subprocess.run(
            self.command(*arguments),
            cwd=self.root,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )

    def build(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """`enginesmith build tiny ARGUMENTS` in this place."""
        return self.run("build", "tiny", *arguments, "--config-dir", str(self.recipes), **env)

    def verdict(self) -> dict[str, Any]:
        """What the newest run told programs."""
        document: dict[str, Any] = json.loads(
            (self.artifacts / ".runs" / "latest" / "verdict.json").read_text()
        )
        return document

    def log(self) -> str:
        """The newest run's log."""
        return (self.artifacts / ".runs" / "latest" / "build.log").read_text()

    def packages(self) -> list[Path]:
        """Every published package."""
        return sorted(path.parent for path in self.artifacts.glob("*/*/*/manifest.json"))

    def leftovers(self) -> list[Path]:
        """Private folders that should not outlive a run."""
        staging = self.artifacts / ".staging"
        private = [*self.root.rglob(".enginesmith-work-*"), *self.root.rglob("*.tmp")]
        return private + (list(staging.iterdir()) if staging.is_dir() else [])

    def copy(self, root: Path, *, packages: bool = True) -> Workplace:
        """Another place with the same model, recipes, cache and, if wanted, packages."""
        skip = shutil.ignore_patterns("model", *(() if packages else ("artifacts",)))
        shutil.copytree(self.root, root, symlinks=True, ignore=skip)
        (root / "model").symlink_to(self.root / "model")
        return Workplace(root)


def run_python(cwd: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`python WORDS` in a folder, with the project on its path."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


def enginesmith(cwd: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`enginesmith WORDS` in a folder."""
    return run_python(cwd, "-m", "pipeline.cli", *words, **env)


def make_workplace(root: Path, model: Path | None = None) -> Workplace:
    """Write the tiny recipe below `root`, with a model of its own unless one is given."""
    place = Workplace(root)
    (place.recipes / "shapes").mkdir(parents=True)
    model = model or tiny_model(root / "model")
    (place.recipes / "tiny.yaml").write_text(RECIPE.format(model=model))
    (place.recipes / "shapes" / "tiny.yaml").write_text(SHAPE)
    return place
