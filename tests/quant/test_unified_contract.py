"""The same checkpoint from both dependency sets: form, scales, config, for every architecture.

The builder runs under today's packages and under those of the build image. `golden/scales.json`
holds the values of each architecture's scales; whichever set runs the tests is compared with it.
After a change of the tiny models or of calibration:

    python -m tests.quant.test_unified_contract
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import CorruptError
from pipeline.core.values import Checkpoint
from pipeline.model.read import read_spec
from pipeline.quant.fp8 import SPEC
from pipeline.quant.modelopt import normalize_export
from pipeline.quant.spec import FP8_E4M3_MAX
from pipeline.quant.unified import UnifiedCheckpoint
from tests.architectures import ARCHITECTURES
from tests.quant.tiny_quantized import architecture_checkpoint

GOLDEN = Path(__file__).parent / "golden" / "scales.json"
BF16_STEP = 2.0**-7
"""Distance of neighbouring bfloat16 values, relative, at its largest: another CPU's last bits can
round an activation scale up to the next one."""


CACHE_SCALE_ERROR = 1e-4
"""Cache scales are float32; what remains is the rounding of another CPU's float32 products."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


@pytest.fixture(params=ARCHITECTURES)
def made(request: pytest.FixtureRequest, root: Path) -> Checkpoint:
    """A tiny model's checkpoint; made once, then taken from the cache."""
    return architecture_checkpoint(root, request.param)


def config_of(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return parsed


def test_scales_are_those_on_record(made: Checkpoint) -> None:
    golden = json.loads(GOLDEN.read_text())[made.weights.dir.name]
    assert golden["source"] == source_sha256(made), (
        "the tiny model's weights are not those that the scales were recorded from; "
        "run python -m tests.quant.test_unified_contract"
    )
    scales = scales_of(made.dir)
    assert set(scales) == set(golden["scales"])
    for name, value in golden["scales"].items():
        if name.endswith(".weight_scale"):
            assert scales[name] == value, name
        elif name.endswith(".input_scale"):
            assert scales[name] == pytest.approx(value, rel=BF16_STEP), name
        else:
            assert scales[name] == pytest.approx(value, rel=CACHE_SCALE_ERROR), name


def test_cache_scales_are_the_calibrated_ranges(made: Checkpoint) -> None:
    scales = scales_of(made.dir)
    amax = made.calibration["amax"]
    for number in range(3):
        for part in "kv":
            attention = f"model.layers.{number}.self_attn"
            seen = amax[f"{attention}.{part}_bmm_quantizer"] / FP8_E4M3_MAX
            assert scales[f"{attention}.{part}_proj.{part}_scale"] == pytest.approx(seen, rel=1e-6)
            assert seen < 1, "ModelOpt 0.37's floor of 1 would not show here"


def test_what_runtimes_fuse_shares_a_scale_or_is_one_matrix(made: Checkpoint) -> None:
    scales = scales_of(made.dir)
    fused_in_source = "model.layers.0.self_attn.qkv_proj" in made.quantized_linears
    groups = UnifiedCheckpoint(made.dir).spec.fused_modules()
    assert len(groups) == (0 if fused_in_source else 2 * 3)
    for names in groups.values():
        assert len({scales[f"{name}.weight_scale"] for name in names}) == 1


def test_checkpoint_has_the_sources_shape(made: Checkpoint) -> None:
    source, checkpoint = config_of(made.weights.dir), config_of(made.dir)
    assert read_spec(checkpoint) == read_spec(source)
    quantization = checkpoint.pop("quantization_config")
    assert quantization.pop("producer")["name"] == "modelopt"
    assert quantization == {
        "config_groups": {
            "group_0": {
                "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
                "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
                "targets": ["Linear"],
            }
        },
        "ignore": ["lm_head", "model.embed_tokens"],
        "quant_algo": "FP8",
        "quant_method": "modelopt",
    }
    assert checkpoint == source


def test_declared_quantization_is_the_same_under_both_sets(made: Checkpoint) -> None:
    declared = json.loads((made.dir / "hf_quant_config.json").read_text())
    assert declared.pop("producer")["name"] == "modelopt"
    assert declared == {
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": None,
            "exclude_modules": ["lm_head", "model.embed_tokens"],
        }
    }


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("phi3", ("mlp.gate_up_proj", "mlp.down_proj")),
        ("phi4-mini", ("self_attn.qkv_proj",)),
        ("qwen2.5", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mistral", ("mlp.down_proj",)),
    ],
)
def test_kept_linears_have_no_scales_and_stay_as_they_were(
    root: Path, name: str, kept: tuple[str, ...]
) -> None:
    patterns = tuple(f"model.layers.1.{linear}" for linear in kept)
    made = architecture_checkpoint(root, name, *patterns)
    assert sorted(made.kept_16bit) == sorted(patterns)
    checkpoint, source = UnifiedCheckpoint(made.dir), UnifiedCheckpoint(made.weights.dir)
    for module in patterns:
        got, want = (opened.read(f"{module}.weight") for opened in (checkpoint, source))
        assert got.tobytes() == want.tobytes()
        assert f"{module}.weight_scale" not in checkpoint.tensors
    assert set(config_of(made.dir)["quantization_config"]["ignore"]) > set(patterns)


def test_cache_scale_that_was_not_calibrated_is_refused(root: Path, tmp_path: Path) -> None:
    made = architecture_checkpoint(root, "phi3")
    with pytest.raises(CorruptError, match=r"self_attn\.[kv]_proj\.[kv]_scale, which calibration"):
        normalize_export(
            made.dir, made.weights.dir, tmp_path, precision=SPEC, kept_16bit=(), cache_scales={}
        )


def scales_of(checkpoint_dir: Path) -> dict[str, float]:
    """All its scales."""
    checkpoint = UnifiedCheckpoint(checkpoint_dir)
    names = (name for name in checkpoint.tensors if name.endswith("_scale"))
    return {name: float(checkpoint.scalar(name)) for name in sorted(names)}


def source_sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 of the weights that a checkpoint was made from."""
    return hashlib.sha256((checkpoint.weights.dir / "model.safetensors").read_bytes()).hexdigest()


def _record() -> Iterator[tuple[str, dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        for name in ARCHITECTURES:
            made = architecture_checkpoint(Path(folder), name)
            yield name, {"source": source_sha256(made), "scales": scales_of(made.dir)}


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(dict(_record()), indent=1) + "\n")
