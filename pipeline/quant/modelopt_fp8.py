"""FP8 with NVIDIA ModelOpt: calibrate, share scales, export, check every tensor.

E4M3 weights and static activations, one scale per tensor (scale = amax / 448), the KV cache's
scales beside them. Linears that match `keep_16bit` stay bfloat16.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass

from pipeline.core.cache import StageCache, source_digest
from pipeline.core.errors import RecipeError
from pipeline.core.progress import progress
from pipeline.core.settings import STRICT, Listed
from pipeline.core.values import Checkpoint, Weights
from pipeline.model.hf import load_model, load_tokenizer, quiet
from pipeline.model.spec import ModelSpec
from pipeline.quant.calibration import Calibration, cache_scales, check_amax
from pipeline.quant.device import (
    DeviceChoice,
    choose_placement,
    cpu_dtype,
    estimated_cpu_s,
    free_vram_bytes,
    place,
)
from pipeline.quant.export import normalize_export
from pipeline.quant.fp8 import SPEC
from pipeline.quant.keep import keep_16bit_faults, select
from pipeline.quant.sharing import share_scales
from pipeline.quant.unified import UnifiedCheckpoint
from pipeline.quant.verify import verify_checkpoint
from pipeline.sources.text.corpus import text_digest
from pipeline.sources.text.windows import pack_windows

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

RECORD = "calibration.json"
_CODE = ("pipeline.quant", "pipeline.sources.text", "pipeline.model.hf", "pipeline.quant.unified")
_TOOLS = ("nvidia-modelopt", "torch", "transformers")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelOptFp8:
    """Quantizer: per-tensor FP8 with static activation scales.

    Attributes:
        keep_16bit: fnmatch patterns of linears that stay bfloat16, such as
            `model.layers.*.mlp.down_proj`. lm_head always does.
        device: Where calibration runs.
    """

    keep_16bit: Listed[str] = ()
    device: DeviceChoice = "auto"

    @property
    def precision(self) -> str:
        return SPEC.name

    def inputs(self, weights: Weights, calibration: Calibration) -> dict[str, Any]:
        """Everything that shapes the checkpoint's bytes."""
        return {
            "weights": weights.digest,
            "text": text_digest(calibration.text.documents()),
            "calibration": {
                "calib_size": calibration.calib_size,
                "seq_len": calibration.seq_len,
                "batch_size": calibration.batch_size,
                "seed": calibration.seed,
            },
            "keep_16bit": sorted(self.keep_16bit),
            "tools": {name: version(name) for name in _TOOLS},
            "code": source_digest(*_CODE),
        }

    def quantize(
        self, weights: Weights, shape: ModelSpec, calibration: Calibration, cache: StageCache
    ) -> Checkpoint:
        """Return the checkpoint of these weights, made now or found in the cache.

        Raises:
            RecipeError: Too little text, a pattern that keeps half of a fused group.
            CorruptError: An amax that is no range, or an export that is not faithful.
            IncompatibleError: The recipe insists on a device that is not there.
        """
        result = cache.run(
            "quantize",
            self.inputs(weights, calibration),
            lambda out: self._produce(weights, shape, calibration, out),
        )
        record = result.read_json(RECORD)
        return Checkpoint(
            dir=result.dir,
            digest=result.digest,
            weights=weights,
            precision=SPEC.name,
            quantized_linears=tuple(record["quantized_linears"]),
            kept_16bit=tuple(record["kept_16bit"]),
            calibration=record,
        )

    def _produce(
        self, weights: Weights, shape: ModelSpec, calibration: Calibration, out_dir: Path
    ) -> None:
        import psutil
        import torch

        documents = calibration.text.documents()
        windows = pack_windows(
            documents,
            load_tokenizer(weights.dir),
            seq_len=calibration.seq_len,
            count=calibration.calib_size,
            seed=calibration.seed,
        )
        placement = choose_placement(
            self.device,
            shape,
            batch_tokens=calibration.batch_size * calibration.seq_len,
            free_vram_bytes=free_vram_bytes() if self.device != "cpu" else None,
        )
        dtype = "bfloat16"
        if placement.kind == "cpu":
            dtype = cpu_dtype(shape, psutil.virtual_memory().available)
        log.info("Calibrating on %s in %s: %s", placement.kind, dtype, placement.reason)
        if placement.kind == "cpu":
            estimate = estimated_cpu_s(shape, calibration.tokens)
            log.info("%d tokens, about %.0f s", calibration.tokens, estimate)
        model = load_model(weights.dir, dtype)
        spec = UnifiedCheckpoint(weights.dir).spec
        if faults := keep_16bit_faults(self.keep_16bit, spec):
            raise RecipeError(faults)
        kept = set(select(self.keep_16bit, spec.modules))
        device = place(model, placement)
        batches = torch.split(torch.from_numpy(windows).to(device), calibration.batch_size)
        self._calibrate(model, batches, kept)
        amax = {
            name: float(module.amax.float().max())
            for name, module in model.named_modules()
            if name.endswith("_quantizer") and getattr(module, "amax", None) is not None
        }
        outliers = check_amax(amax)
        for line in outliers:
            log.info("Outlier: %s", line)
        groups = share_scales(model, spec)
        exported = self._export(model, weights, out_dir)
        normalize_export(
            exported,
            weights.dir,
            out_dir,
            kept_16bit=sorted(kept),
            cache_scales=cache_scales(amax),
        )
        shutil.rmtree(exported)
        fp8 = [name for name in spec.modules if name not in kept]
        ledger = verify_checkpoint(out_dir, weights.dir, SPEC, set(fp8))
        record = {
            "text": {"origin": calibration.text.origin, "digest": text_digest(documents)},
            "tools": {name: version(name) for name in _TOOLS},
            "tokens": int(windows.size),
            "device": placement.kind,
            "amax": amax,
            "outliers": outliers,
            "shared_scale": {label: list(names) for label, names in sorted(groups.items())},
            "ledger": ledger.to_json(),
            "quantized_linears": fp8,
            "kept_16bit": sorted(kept),
        }
        (out_dir / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def _calibrate(self, model: Any, batches: Sequence[torch.Tensor], kept: set[str]) -> None:
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

        with quiet():
            mtq.quantize(model, modelopt_config(kept), forward_loop)

    def _export(self, model: Any, weights: Weights, out_dir: Path) -> Path:
        """ModelOpt's own unified checkpoint, in a folder inside `out_dir`."""
        from modelopt.torch.export import export_hf_checkpoint

        exported = out_dir / "exported"
        with quiet(), _architecture_known(model, weights.dir):
            # The model's own dtype: asked for bfloat16, it would divide by the scale in bfloat16
            # and round a second time.
            export_hf_checkpoint(model, dtype=model.dtype, export_dir=str(exported))
        return exported


@contextlib.contextmanager
def _architecture_known(model: Any, folder: Path) -> Iterator[None]:
    """The exporter needs `config.architectures`, which a model made from a config class lacks."""
    if model.config.architectures is None:
        config = UnifiedCheckpoint(folder).config_json
        model.config.architectures = list(config["architectures"])
    yield


def modelopt_config(kept: set[str]) -> dict[str, Any]:
    """ModelOpt's FP8 config with KV-cache scales, less the kept linears.

    ModelOpt changed the type of `quant_cfg` from a mapping (0.37) to a list of rules (0.47); both
    are served, since the build image holds the older one.
    """
    import modelopt.torch.quantization as mtq

    config: dict[str, Any] = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    kv_rules = copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
    if isinstance(config["quant_cfg"], list):
        config["quant_cfg"] += kv_rules
        for name in sorted(kept):
            for kind in ("weight", "input"):
                rule = {"quantizer_name": f"{name}.{kind}_quantizer", "enable": False}
                config["quant_cfg"].append(rule)
    else:
        config["quant_cfg"].update({k: v for k, v in kv_rules.items() if k != "default"})
        for name in sorted(kept):
            for kind in ("weight", "input"):
                config["quant_cfg"][f"{name}.{kind}_quantizer"] = {"enable": False}
    return config


KIND = ModelOptFp8
