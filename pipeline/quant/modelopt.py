"""Quantizing with NVIDIA ModelOpt: calibrate, share scales, export, check every tensor.

A precision's module says how (its `QuantSpec`), and its settings class runs a `ModelOptJob`. The KV
cache's scales are calibrated beside the linears', whatever their precision. Linears that match
`keep_16bit` stay bfloat16.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.cache import StageCache, require_files
from pipeline.core.errors import RecipeError
from pipeline.core.progress import progress
from pipeline.core.stage_protocols import CalibrationText
from pipeline.core.stages import Stage
from pipeline.core.values import Checkpoint, Weights
from pipeline.model.hf import load_model, load_tokenizer, quiet
from pipeline.model.spec import ModelSpec
from pipeline.quant.calibration import cache_scales, check_amax
from pipeline.quant.device import (
    DeviceChoice,
    choose_placement,
    cpu_dtype,
    free_vram_bytes,
    place,
)
from pipeline.quant.export import normalize_export
from pipeline.quant.keep import keep_16bit_faults, select
from pipeline.quant.sharing import share_scales
from pipeline.quant.spec import QuantSpec
from pipeline.quant.unified import UnifiedCheckpoint
from pipeline.quant.verify import require_finite, verify_checkpoint

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

RECORD = "calibration.json"
STAGE = Stage(
    name="quantize",
    version=1,
    code=("pipeline.quant", "pipeline.sources.text", "pipeline.model"),
)
_TOOLS = ("nvidia-modelopt", "torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class ModelOptJob:
    """One quantization.

    Attributes:
        precision: What linears become.
        calibration: Text that sets the activation scales.
        keep_16bit: fnmatch patterns of linears that stay bfloat16.
        device: Where calibration runs.
    """

    precision: QuantSpec
    calibration: CalibrationText
    keep_16bit: tuple[str, ...]
    device: DeviceChoice

    def inputs(self, weights: Weights) -> dict[str, Any]:
        """Everything that shapes the checkpoint's bytes."""
        return {
            **STAGE.identity,
            "weights": weights.digest,
            "precision": self.precision.name,
            **self.calibration.inputs(),
            "keep_16bit": sorted(self.keep_16bit),
            "tools": {name: version(name) for name in _TOOLS},
        }

    def quantize(self, weights: Weights, cache: StageCache) -> Checkpoint:
        """Return the checkpoint of these weights, made now or found in the cache.

        Raises:
            RecipeError: Too little text, a pattern that keeps half of a fused group.
            CorruptError: Weights that are not finite, an amax that is no range, or an export that
                is not faithful.
            IncompatibleError: The recipe insists on a device that is not there.
        """
        result = cache.run(STAGE, self.inputs(weights), lambda out: self._produce(weights, out))
        record = result.read_json(RECORD)
        return Checkpoint(
            dir=result.dir,
            digest=result.digest,
            weights=weights,
            precision=self.precision.name,
            quantized_linears=tuple(record["quantized_linears"]),
            kept_16bit=tuple(record["kept_16bit"]),
            calibration=record,
        )

    def _produce(self, weights: Weights, out_dir: Path) -> None:
        require_files(weights.dir, weights.files)
        source = UnifiedCheckpoint(weights.dir)
        spec = source.spec
        if faults := keep_16bit_faults(self.keep_16bit, spec):
            raise RecipeError(faults)
        require_finite(source)
        kept = select(self.keep_16bit, spec.modules)
        model, record = self._calibrated(weights, spec, kept)
        groups = share_scales(model, spec, self.precision.code_max)
        exported = _export(model, source, out_dir)
        normalize_export(
            exported,
            weights.dir,
            out_dir,
            precision=self.precision,
            kept_16bit=sorted(kept),
            cache_scales=cache_scales(record["amax"]),
        )
        shutil.rmtree(exported)
        quantized = [name for name in spec.modules if name not in kept]
        ledger = verify_checkpoint(out_dir, weights.dir, self.precision, set(quantized))
        record |= {
            "tools": {name: version(name) for name in _TOOLS},
            "shared_scale": {label: list(names) for label, names in sorted(groups.items())},
            "quantized_linears": quantized,
            "kept_16bit": sorted(kept),
            "ledger": asdict(ledger),
        }
        (out_dir / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def _calibrated(
        self, weights: Weights, spec: ModelSpec, kept: Sequence[str]
    ) -> tuple[Any, dict[str, Any]]:
        """The model with quantizers that saw every window, and what they saw."""
        import psutil
        import torch

        windows = self.calibration.windows(load_tokenizer(weights.dir))  # [windows, tokens]
        placement = choose_placement(
            self.device,
            spec,
            batch_tokens=self.calibration.batch_size * windows.shape[1],
            free_vram_bytes=free_vram_bytes() if self.device != "cpu" else None,
        )
        dtype = "bfloat16"
        if placement.kind == "cpu":
            dtype = cpu_dtype(spec, psutil.virtual_memory().available)
        log.info("Calibrating on %s in %s: %s", placement.kind, dtype, placement.reason)
        model = load_model(weights.dir, dtype)
        device = place(model, placement)
        batches = torch.split(torch.from_numpy(windows).to(device), self.calibration.batch_size)
        self._calibrate(model, batches, kept)
        amax = {
            name: float(module.amax.float().max())
            for name, module in model.named_modules()
            if name.endswith("_quantizer") and getattr(module, "amax", None) is not None
        }
        outliers = check_amax(amax)
        for line in outliers:
            log.info("Outlier: %s", line)
        return model, {
            "text": self.calibration.record(),
            "tokens": int(windows.size),
            "device": placement.kind,
            "amax": amax,
            "outliers": outliers,
        }

    def _calibrate(self, model: Any, batches: Sequence[torch.Tensor], kept: Sequence[str]) -> None:
        """Insert quantizers and let them see every window; lm_head is skipped, it stays 16-bit."""
        import modelopt.torch.quantization as mtq
        import torch

        def forward_loop(quantized: Any) -> None:
            with (
                torch.no_grad(),
                progress("Calibrating", sum(map(len, batches)), "windows") as done,
            ):
                for batch in batches:
                    quantized.base_model(batch, use_cache=False)
                    done(len(batch))

        if self.precision.modelopt_config is None:
            raise ValueError(f"ModelOpt does not quantize to {self.precision.name}")
        with quiet():
            mtq.quantize(model, self.precision.modelopt_config(kept), forward_loop)


def _export(model: Any, source: UnifiedCheckpoint, out_dir: Path) -> Path:
    """ModelOpt's own unified checkpoint, in a folder inside `out_dir`."""
    from modelopt.torch.export import export_hf_checkpoint

    if model.config.architectures is None:  # as of a model made from a config class
        model.config.architectures = list(source.config_json["architectures"])
    exported = out_dir / "exported"
    with quiet():
        # The model's own dtype: asked for bfloat16, it would divide by the scale in bfloat16 and
        # round a second time.
        export_hf_checkpoint(model, dtype=model.dtype, export_dir=str(exported))
    return exported
