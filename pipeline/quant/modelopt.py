"""Quantizing with NVIDIA ModelOpt: calibrate, share scales, export, check every tensor.

A precision's module says how (its `QuantSpec`), and its `ModelOptQuantizer` runs a `ModelOptJob`.
The KV cache's scales are calibrated beside the linears', whatever their precision.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pydantic.dataclasses

from pipeline.core.cache import Stage, StageCache, require_files
from pipeline.core.errors import CorruptError, RecipeError
from pipeline.core.progress import progress
from pipeline.core.safetensors_files import read_header
from pipeline.core.settings import STRICT, Listed
from pipeline.core.values import Checkpoint, Weights
from pipeline.model.hf import load_model, load_tokenizer, quiet
from pipeline.model.spec import ModelSpec
from pipeline.quant.bf16 import SPEC as SIXTEEN_BIT
from pipeline.quant.calibration import (
    DeviceChoice,
    cache_scales,
    check_amax,
    choose_placement,
    cpu_dtype,
    free_vram_bytes,
    place,
    share_scales,
)
from pipeline.quant.spec import SHAPING_CODE, QuantSpec, quant_spec, quantizer_faults, select
from pipeline.quant.unified import (
    DECLARATION,
    UnifiedCheckpoint,
    all_finite,
    copy_companions,
    list_faults,
    torch_view,
)
from pipeline.sources.text.corpus import Calibration

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

RECORD = "calibration.json"
STAGE = Stage(
    name="quantize",
    version=2,
    code=("pipeline.sources.text", *SHAPING_CODE),
)
_TOOLS = ("nvidia-modelopt", "torch", "transformers")
_CACHE = (".k_scale", ".v_scale")
_WEIGHTS = "*weight_quantizer"
_SCALES = (".weight_scale", ".input_scale", *_CACHE)


def with_cache_scales(
    config: Mapping[str, Any], disabled: Collection[str], **weights: Any
) -> dict[str, Any]:
    """One of ModelOpt's configs with scales for an FP8 KV cache, less the named quantizers.

    `weights` are settings of the weight quantizers in place of the config's. ModelOpt changed the
    type of `quant_cfg` from a mapping (0.37) to a list of rules (0.47); both are served, and here
    alone, since the build image holds the older one.
    """
    import modelopt.torch.quantization as mtq

    made: dict[str, Any] = copy.deepcopy(dict(config))
    kv_rules = copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
    if isinstance(made["quant_cfg"], list):
        made["quant_cfg"] += kv_rules
        made["quant_cfg"] += [{"quantizer_name": name, "enable": False} for name in disabled]
        found = [one for one in made["quant_cfg"] if one["quantizer_name"] == _WEIGHTS]
        settings = [one["cfg"] for one in found if one.get("cfg")]
    else:
        made["quant_cfg"].update({k: v for k, v in kv_rules.items() if k != "default"})
        made["quant_cfg"].update({name: {"enable": False} for name in disabled})
        settings = [made["quant_cfg"][_WEIGHTS]]
    for one in settings:
        one.update(weights)
    return made


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A model that saw the calibration text, and what a checkpoint is made of beside it."""

    model: Any
    source: UnifiedCheckpoint
    precision: QuantSpec
    kept_16bit: tuple[str, ...]
    cache_scales: Mapping[str, float]


@dataclass
class Factors:
    """What the rows and the columns of one source tensor are multiplied by before rounding.

    What counts is the tensor plus `offset`, which is added before and taken off after.
    """

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    offset: float = 0.0

    def of(self, values: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """Some rows of the tensor, from `first_row` on, in float32."""
        values = values.float()
        if self.rows is not None:
            rows = self.rows[first_row : first_row + len(values)]
            rows = rows.reshape(-1, *[1] * (values.ndim - 1))
            values = (values + self.offset) * rows - self.offset
        return values if self.columns is None else values * self.columns


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a writer adds to the record, and how it changed source tensors before it rounded."""

    record: Mapping[str, Any]
    factors: Mapping[str, Factors]


def write_export(calibrated: Calibrated, out_dir: Path) -> Written:
    """Share scales, let ModelOpt round and export, and make that export the hub checkpoint."""
    model, source, precision = calibrated.model, calibrated.source, calibrated.precision
    groups = share_scales(model, source.spec, precision.code_max)
    exported = _export(model, source, out_dir)
    normalize_export(
        exported,
        source.dir,
        out_dir,
        precision=precision,
        kept_16bit=sorted(calibrated.kept_16bit),
        cache_scales=calibrated.cache_scales,
    )
    shutil.rmtree(exported)
    shared = {label: list(names) for label, names in sorted(groups.items())}
    return Written(record={"shared_scale": shared}, factors={})


@dataclass(frozen=True, kw_only=True)
class ModelOptJob:
    """One quantization; linears that match `keep_16bit` (fnmatch) stay bfloat16.

    `write` makes the checkpoint of a calibrated model.
    """

    precision: QuantSpec
    calibration: Calibration
    keep_16bit: tuple[str, ...]
    device: DeviceChoice
    write: Callable[[Calibrated, Path], Written] = write_export

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
            RecipeError: Too little text, or half of a fused group is kept.
            CorruptError: Weights that are not finite, an amax that is no range, an unfaithful copy.
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
        if faults := quantizer_faults(self.precision, self.keep_16bit, spec):
            raise RecipeError(faults)
        require_finite(source)
        kept = select(self.keep_16bit, spec.modules)
        model, record = self._calibrate(weights, spec)
        calibrated = Calibrated(
            model=model,
            source=source,
            precision=self.precision,
            kept_16bit=kept,
            cache_scales=cache_scales(record["amax"]),
        )
        written = self.write(calibrated, out_dir)
        quantized = [name for name in spec.modules if name not in kept]
        made = (out_dir, weights.dir, self.precision, set(quantized))
        ledger = verify_checkpoint(*made, factors=written.factors)
        record |= {
            "tools": {name: version(name) for name in _TOOLS},
            **written.record,
            "quantized_linears": quantized,
            "kept_16bit": sorted(kept),
            "ledger": ledger,
        }
        (out_dir / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def _calibrate(self, weights: Weights, spec: ModelSpec) -> tuple[Any, dict[str, Any]]:
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
        self._show_windows(model, batches, self.precision.group_size(spec))
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

    def _show_windows(self, model: Any, batches: Sequence[torch.Tensor], group: int | None) -> None:
        """Insert quantizers and let them see every window; lm_head is skipped, it stays 16-bit.

        Where ModelOpt reads a second time, it searches, many times slower: one batch is enough.
        """
        import modelopt.torch.quantization as mtq
        import torch

        readings = iter([batches])

        def forward_loop(quantized: Any) -> None:
            read = next(readings, batches[:1])
            windows = sum(map(len, read))
            with torch.no_grad(), progress("Calibrating", windows, "windows") as done:
                for batch in read:
                    quantized.base_model(batch, use_cache=False)
                    done(len(batch))

        if self.precision.modelopt_config is None:
            raise ValueError(f"ModelOpt does not quantize to {self.precision.name}")
        with quiet():
            # Patterns, not names: ModelOpt tries each entry on every module, 2 s for SmolLM2's.
            config = self.precision.modelopt_config(self.keep_16bit, group)
            mtq.quantize(model, config, forward_loop)


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelOptQuantizer:
    """A recipe's quantizer, of the precision that a subclass names.

    `keep_16bit` has fnmatch patterns of linears that stay bfloat16, such as
    `model.layers.*.mlp.down_proj`. lm_head always does.
    """

    precision: ClassVar[str]

    keep_16bit: Listed[str] = ()
    device: DeviceChoice = "auto"

    def inputs(self, weights: Weights, calibration: Calibration) -> Mapping[str, Any]:
        return self.job(calibration).inputs(weights)

    def quantize(self, weights: Weights, calibration: Calibration, cache: StageCache) -> Checkpoint:
        return self.job(calibration).quantize(weights, cache)

    def job(self, calibration: Calibration) -> ModelOptJob:
        return ModelOptJob(
            precision=quant_spec(self.precision),
            calibration=calibration,
            keep_16bit=self.keep_16bit,
            device=self.device,
            write=self.write,
        )

    def write(self, calibrated: Calibrated, out_dir: Path) -> Written:
        """Make the checkpoint of a calibrated model."""
        return write_export(calibrated, out_dir)


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


def normalize_export(
    exported: Path,
    weights_dir: Path,
    out_dir: Path,
    *,
    precision: QuantSpec,
    kept_16bit: Sequence[str],
    cache_scales: Mapping[str, float],
) -> None:
    """Write the hub checkpoint: bfloat16, the source's own config, all companions.

    Three things of ModelOpt's export are changed. Tensors that are no FP8 weight and no scale
    become bfloat16. `config.json` is the source's own with the quantization added, since the
    exporter rewrites it in the installed Transformers' spelling; linears that stay 16-bit are
    listed by their exact names, where ModelOpt writes wildcards. And the KV cache is declared
    16-bit: whether a runtime uses its FP8 scales is the compiler's choice. These are written from
    the calibrated amax: ModelOpt 0.37 would raise each to at least 1.0, 0.47 does not.

    Raises:
        CorruptError: It lacks its quantization config or weights, or has an uncalibrated scale.
    """
    shards = sorted(exported.glob("*.safetensors"))
    config = json.loads((exported / "config.json").read_text())
    if not shards or "quantization_config" not in config:
        raise CorruptError("ModelOpt exported no quantized weights; see the log of this run")
    for shard in shards:
        _normalize_shard(shard, out_dir / shard.name, precision.weight_dtype, cache_scales)
    for index in exported.glob("*.safetensors.index.json"):
        shutil.copyfile(index, out_dir / index.name)
    ignored = ["lm_head", "model.embed_tokens", *kept_16bit]
    quantization = config["quantization_config"]
    quantization |= {"ignore": ignored, "quant_algo": precision.quant_algo}
    quantization.pop("kv_cache_scheme", None)
    write_config(weights_dir, out_dir, quantization)
    quant_config = json.loads((exported / DECLARATION).read_text())
    quant_config["quantization"] |= {
        "quant_algo": precision.quant_algo,
        "kv_cache_quant_algo": None,
        "exclude_modules": ignored,
    }
    _write_json(out_dir / DECLARATION, quant_config)


def write_config(weights_dir: Path, out_dir: Path, quantization: Mapping[str, Any]) -> None:
    """The source's own `config.json` with its quantization, and all companions."""
    config = json.loads((weights_dir / "config.json").read_text())
    config["dtype" if "dtype" in config else "torch_dtype"] = "bfloat16"
    _write_json(out_dir / "config.json", {**config, "quantization_config": quantization})
    copy_companions(weights_dir, out_dir)


def _normalize_shard(
    shard: Path, target: Path, quantized_dtype: str, cache_scales: Mapping[str, float]
) -> None:
    """Move a shard, its tensors as bfloat16 except quantized weights and scales (patched in)."""
    dtypes = ("bfloat16", quantized_dtype)
    if not all(
        entry.dtype == "float32" if name.endswith(_SCALES) else entry.dtype in dtypes
        for name, entry in read_header(shard).items()
    ):
        _round_to_bfloat16(shard, quantized_dtype)
    with shard.open("r+b") as stream:
        for name, entry in read_header(shard).items():
            if name.endswith(_SCALES):
                stream.seek(entry.offset)
                value = struct.unpack("<f", stream.read(entry.size_bytes))[0]
                stream.seek(entry.offset)
                stream.write(struct.pack("<f", _scale(name, value, cache_scales)))
    shard.replace(target)


def _round_to_bfloat16(shard: Path, quantized_dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(shard)
    for name, tensor in tensors.items():
        if name.endswith(_SCALES):
            tensors[name] = tensor.float()
        elif tensor.dtype != getattr(torch, quantized_dtype):
            tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, shard, metadata={"format": "pt"})


def _scale(name: str, value: float, cache_scales: Mapping[str, float]) -> float:
    """The value that a scale must have.

    Those of linears are bfloat16 values stored as float32 (`share_scales`), which a GPU's division
    by 448 misses by a last bit.
    """
    import torch

    if not name.endswith(_CACHE):
        return float(torch.tensor(value, dtype=torch.float32).to(torch.bfloat16))
    if name not in cache_scales:
        raise CorruptError(f"ModelOpt exported {name}, which calibration did not see")
    return cache_scales[name]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


_SLACK = 1.04
"""An exporter that divides by the scale in bfloat16, as on a GPU, rounds by 2^-9 before it rounds
by 2^-4: 3 % more."""
_CHUNK_ROWS = 512
"""So that the intermediate values of a chunk stay in the processor's cache."""


def require_finite(source: UnifiedCheckpoint) -> None:
    """Refuse weights, norms and embeddings that hold NaN or infinite values (CorruptError)."""
    broken = [name for name in source.tensors if not all_finite(source.read(name))]
    if broken:
        raise CorruptError(
            f"{source.dir} holds NaN or infinite values; fetch the weights again, or choose others:"
            f"{list_faults(broken)}"
        )


def verify_checkpoint(
    checkpoint_dir: Path,
    weights_dir: Path,
    precision: QuantSpec,
    quantized_linears: Collection[str],
    *,
    factors: Mapping[str, Factors] | None = None,
) -> dict[str, Any]:
    """Compare an exported checkpoint with its source times `factors`, tensor by tensor.

    An exporter can drop, empty or zero a tensor and still succeed.
    Present, nothing extra, right shape and dtype, 16-bit tensors equal to the source rounded to
    bfloat16, dequantized weights within the precision's rounding error and not lost to zero, two
    KV-cache scales for each attention, all scales finite and positive.

    Returns the ledger of what was rounded: `precision`, `relative_error` (linear -> norm of its
    rounding error over the norm of its weights, three digits: the order of a sum does not show in
    them), `kept_16bit` (linears that were rounded to bfloat16 only). CorruptError lists faults.
    """
    checkpoint, source = UnifiedCheckpoint(checkpoint_dir), UnifiedCheckpoint(weights_dir)
    wanted = set(source.tensors) - ({"lm_head.weight"} if source.spec.tied else set())
    scales = {f"{module}.{kind}" for module in quantized_linears for kind in precision.scales}
    scales |= set(source.spec.kv_scales())
    parameters = checkpoint.parameters
    found = {*parameters, *checkpoint.tensors.keys() - set(parameters.values())}
    faults = [f"{name} is missing" for name in sorted((wanted | scales) - found)]
    faults += [f"{name} was not asked for" for name in sorted(found - wanted - scales)]
    errors = {}
    for name in sorted(wanted & found):
        module = name.removesuffix(".weight")
        stored = precision if module in quantized_linears else SIXTEEN_BIT
        result = _compare(checkpoint, source, name, stored, (factors or {}).get(name, Factors()))
        if isinstance(result, str):
            faults.append(f"{name} {result}")
        elif module in quantized_linears:
            errors[module] = float(f"{result:.3g}")
    for name in sorted(scales & found):
        values = checkpoint.read(name)
        if not all_finite(values) or not (values > 0).all():
            faults.append(f"{name} is {values.reshape(-1)[(~(values > 0)).argmax()]}")
    if faults:
        raise CorruptError(
            f"the exported checkpoint is not a faithful copy of its source:{list_faults(faults)}"
        )
    kept = [name for name in source.spec.modules if name not in errors]
    return {"precision": precision.name, "relative_error": errors, "kept_16bit": kept}


def _compare(
    checkpoint: UnifiedCheckpoint,
    source: UnifiedCheckpoint,
    name: str,
    precision: QuantSpec,
    factors: Factors,
) -> str | float:
    """What is wrong with a tensor beside its source, or else its relative error."""
    import torch

    entry, origin = checkpoint.tensors[checkpoint.parameters[name]], source.tensors[name]
    if entry.dtype != precision.weight_dtype:
        return f"has dtype {entry.dtype}, wanted {precision.weight_dtype}"
    if entry.shape != precision.stored_shape(origin.shape):
        return f"has shape {entry.shape}, its source {origin.shape}"
    got, want = torch_view(checkpoint.read(entry.name)), torch_view(source.read(name))
    if precision is SIXTEEN_BIT:
        rounded = factors.of(want).to(torch.bfloat16)
        if torch.equal(got.view(torch.int16), rounded.view(torch.int16)):
            return 0.0
        return "differs from its source rounded to bfloat16"
    scales = checkpoint.weight_scale(name.removesuffix(".weight"))
    beyond, lost, worst, error_norm, norm, nonzero = 0, 0, 0.0, 0.0, 0.0, 0
    for first in range(0, len(got), _CHUNK_ROWS):
        part = slice(first, first + _CHUNK_ROWS)
        scale = scales[part] if scales.ndim else scales
        weights, rounded = factors.of(want[part], first), precision.dequantize(got[part], scale)
        if scale.ndim:  # one for each group of columns
            scale = scale.float().repeat_interleave(weights.shape[1] // scale.shape[1], 1)
        lost += int(((rounded == 0) & (weights != 0)).sum())
        nonzero += int((weights != 0).sum())
        norm += float(weights.square().sum())
        error = rounded.sub_(weights).abs_()
        error_norm += float(error.square().sum())
        allowed = weights.abs().mul_(precision.relative_step)
        allowed = allowed.clamp_(min=scale * precision.absolute_step) * _SLACK
        outside = ~(error <= allowed)  # not >: a NaN is outside, too
        if outside.any():
            beyond += int(outside.sum())
            worst = max(worst, float((error / allowed).max()))
    if beyond:
        return (
            f"has {beyond} of {want.numel()} values beyond {precision.title} error, the worst by "
            f"{worst:.1f} x"
        )
    if lost > precision.max_lost_share * max(nonzero, 1):
        return (
            f"lost {lost / nonzero:.0%} of its weights to zero ({precision.max_lost_share:.0%} are "
            "allowed): a few are far larger than the rest; list it under quantizer.keep_16bit"
        )
    return float((error_norm / norm) ** 0.5 if norm else 0.0)
