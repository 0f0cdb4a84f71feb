"""`enginesmith new`: find a model and sizes that fit, and write a recipe that plans."""

from __future__ import annotations

import bisect
import contextlib
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from pipeline.build import plan_of
from pipeline.config.compose import ConfigFolders, config_folders, suggestion
from pipeline.config.load import load
from pipeline.config.recipe import Recipe
from pipeline.core.errors import ConflictError, Fault, NotFoundError, RecipeError
from pipeline.core.ownership import require_unshared
from pipeline.core.settings import read_json_object
from pipeline.formats.spec import FormatSpec, format_spec, format_specs
from pipeline.model.read import IRRELEVANT, read_spec
from pipeline.model.spec import ModelSpec
from pipeline.plan.ceilings import REACHABLE_SHARE
from pipeline.quant.spec import KV_CACHE_DTYPES, quant_specs
from pipeline.registry.reference import check_part
from pipeline.runners.workload import Workload
from pipeline.sources.hub import HubClient, is_repo_id
from pipeline.sources.weights import CONFIG, check_listing, licence_of_hub

START_CONTEXT, FLOOR_CONTEXT = 4096, 512
"""Contexts that are tried, in tokens: what our own recipes have, and what a short chat needs."""
_HALVES = 5  # of them: the smallest batch that is tried is 4, or 8
_ISL, _OSL, _SMALL_BATCH = 128, 256, 4  # the workloads of our own recipes
_MAX_NUM_TOKENS = 8192  # TensorRT-LLM's default
_PREFILL_TOKENS = 4096  # of one prefill step of TensorRT-RTX; what a step holds grows with it
_BOUND_FIRST = ("card", "sm", None)
"""A new recipe's own format is the first of these that fits: what is made for less is faster."""
_WINDOW_TOKENS = 256
"""`window_tokens` of conf/acceptance/cpu.yaml, which needs as much context."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A model for a recipe: its `config.json`, and what the `source` section will say."""

    described: str
    config: Mapping[str, Any]
    option: Literal["hub", "local"]
    source: Mapping[str, Any]


def read_origin(text: str, revision: str | None) -> Origin:
    """Find the model that `--from` names: a folder, else a Hub repository."""
    folder = Path(text).expanduser()
    if folder.is_dir():
        if revision is not None:
            message = f"{text} is a folder, and only a Hub repository has revisions; leave it out"
            raise RecipeError([Fault("--revision", message)])
        return _local(folder.resolve())
    if text.startswith(("/", ".", "~")):
        raise NotFoundError(f"--from: {text} is not a folder; it must hold a model's {CONFIG}")
    if not is_repo_id(text):
        message = f"{text!r} is neither a folder nor <owner>/<name>, as repositories on the Hub are"
        raise RecipeError([Fault("--from", message)])
    return _hub(text, revision or "main")


def _local(folder: Path) -> Origin:
    if not (folder / CONFIG).is_file():
        raise NotFoundError(f"--from: {folder} has no {CONFIG}; it must hold a model")
    config = read_json_object(folder / CONFIG)
    source = {"path": str(folder), "licence": licence_of_hub(None).spdx}
    return Origin(described=f"The folder {folder}", config=config, option="local", source=source)


def _hub(repo_id: str, revision: str) -> Origin:
    found = HubClient(repo_id, revision).describe()
    check_listing(found.files, f"{repo_id}@{found.commit[:12]}")
    with tempfile.TemporaryDirectory() as folder:
        HubClient(repo_id, found.commit).download(found.files[CONFIG], Path(folder))
        config = read_json_object(Path(folder) / CONFIG)
    terms = licence_of_hub(found.licence)
    source = {
        "repo_id": repo_id,
        "revision": found.commit,
        "licence": terms.spdx,
        "redistribution": terms.redistribution,
        **({"gated": True} if found.gated else {}),
        **({"notice": terms.notice} if terms.notice else {}),
    }
    described = f"{repo_id} on the Hugging Face Hub at commit {found.commit}"
    return Origin(described=described, config=config, option="hub", source=source)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Settings of one compiler that fit, and the largest batch whose workload fits with them."""

    settings: Mapping[str, Any]
    batch: int
    context: int


def targets(batch: int, context: int) -> tuple[Workload, ...]:
    """Workloads of a new recipe: four requests at once, and the largest batch that fits."""
    isl = min(_ISL, max(context // 3, 1))
    osl = min(_OSL, max(2 * context // 3, 1))
    share = REACHABLE_SHARE
    return tuple(
        Workload(name=f"gpu-b{size}", batch=size, isl=isl, osl=osl, min_share_of_ceiling=share)
        for size in sorted({min(_SMALL_BATCH, batch), batch})
    )


def most_batch(spec: FormatSpec) -> int:
    """The largest batch that is tried."""
    return 64 if spec.fit.static else 128


def largest(recipe: Recipe) -> Fitted:
    """The largest sizes of the recipe's compiler that its plan has no fault with.

    Contexts and batches go down by halves until the plan accepts; then the batch grows. The KV
    cache has the smallest type that the format holds and the known-bad table allows.
    """
    spec = format_spec(recipe.compiler.format)
    for kv_cache_dtype in _cache_dtypes(spec):
        for batch, context in _sizes_to_try(spec, recipe.shape):
            size = partial(_fit, spec, context=context, kv_cache_dtype=kv_cache_dtype)
            faults = _faults(recipe, size(batch))
            if not faults:
                larger = range(batch + 1, min(2 * batch, most_batch(spec) + 1))
                most = bisect.bisect(larger, False, key=lambda b: bool(_faults(recipe, size(b))))
                return size(batch + most)
            if any(fault.path == "compiler.kv_cache_dtype" for fault in faults):
                break
    last = f"at batch {batch} x context {context}, the smallest that is tried"
    raise RecipeError([Fault(fault.path, f"{last}: {fault.message}") for fault in faults])


def _faults(recipe: Recipe, fitted: Fitted) -> tuple[Fault, ...]:
    plan = plan_of(
        replace(
            recipe,
            compiler=replace(cast("Any", recipe.compiler), **fitted.settings),
            acceptance=replace(recipe.acceptance, targets=targets(fitted.batch, fitted.context)),
        )
    )
    if plan.faults or plan.fit.full_length_sequences:
        return plan.faults
    message = f"not one sequence of {fitted.context} tokens fits beside the weights"
    return (Fault("target", message),)


def _cache_dtypes(engine_format: FormatSpec) -> list[str]:
    """One type of the cache for each size of an element, the smallest first."""
    names = reversed(engine_format.kv_cache_dtypes)
    by_size = {KV_CACHE_DTYPES[name].bytes_per_element: name for name in names}
    return [by_size[size] for size in sorted(by_size)]


def _sizes_to_try(spec: FormatSpec, shape: ModelSpec) -> list[tuple[int, int]]:
    """Batches and contexts by halves, the largest first."""
    contexts = _contexts(shape)
    sizes = [(most_batch(spec) >> half, context) for half in range(_HALVES) for context in contexts]
    if not spec.fit.static:
        return sizes
    # The cache holds batch x context; of two equal products the larger batch is the faster.
    return sorted(sizes, key=lambda size: (size[0] * size[1], size[0]), reverse=True)


def _fit(spec: FormatSpec, batch: int, context: int, kv_cache_dtype: str) -> Fitted:
    settings = {"max_batch_size": batch, "max_seq_len": context}
    if spec.fit.static:
        settings |= {
            "opt_batch_size": min(8, batch),
            "max_prefill_batch_size": max(1, min(8, batch, _PREFILL_TOKENS // context)),
        }
        return Fitted(settings=settings, batch=batch, context=context)
    tokens = max(batch, min(_MAX_NUM_TOKENS, _ISL * batch, context * batch))
    # Half of the batch runs in the workload; the queue takes the rest.
    return Fitted(
        settings={**settings, "max_num_tokens": tokens, "kv_cache_dtype": kv_cache_dtype},
        batch=batch // 2,
        context=context,
    )


def _contexts(shape: ModelSpec) -> list[int]:
    """Contexts to try, longest first, up to the sliding window and LongRoPE's original context.

    Up to them every runtime attends to the same tokens with the same factors.
    """
    start = min(START_CONTEXT, shape.max_position_embeddings)
    for edge in (shape.window_of_all, shape.short_rope_context):
        if edge is not None and edge >= FLOOR_CONTEXT:
            start = min(start, edge)
    halves = [START_CONTEXT >> half for half in range(START_CONTEXT // FLOOR_CONTEXT)]
    return [start, *(step for step in halves if FLOOR_CONTEXT <= step < start)]


@dataclass(frozen=True, kw_only=True)
class NewRecipe:
    """What was written: the recipe is the last file, and has the first of the compilers."""

    folder: Path
    files: tuple[Path, ...]
    sizes: Mapping[str, Fitted]
    left_out: Mapping[str, str]
    source: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Later versions only add."""
        return {
            "recipe": self.files[-1].stem,
            "files": [str((self.folder / path).absolute()) for path in self.files],
            "compilers": {
                name: {**fitted.settings, "context": fitted.context}
                for name, fitted in self.sizes.items()
            },
            "left_out": dict(self.left_out),
            "source": dict(self.source),
        }


def new_recipe(
    name: str, *, origin: str, revision: str | None, target: str, config_dir: Path | None
) -> NewRecipe:
    """Write a recipe that loads and plans without faults: all of its files, or none.

    They go to `config_dir`, else to `./recipes`, or `.` where that does not exist.
    """
    check_part("name", name)
    folders = config_folders(config_dir)
    folder = config_dir or (Path("recipes") if Path("recipes").is_dir() else Path())
    own = [folder / "shapes" / f"{name}.yaml", folder / "sizes" / name]
    taken = [folders.recipe_dir(name), folders.conf if name == "build" else None]
    where = [f"{found}/{name}.yaml" for found in taken if found is not None]
    if where := [*where, *(str(path) for path in own if path.exists())]:
        raise ConflictError(
            f"{where[0]} exists, and is not overwritten; choose another name, or remove it first"
        )
    known = folders.options("target")
    if target not in known:
        message = f"there is no option {target!r}; {suggestion(target, known)}"
        raise RecipeError([Fault("--target", message)])
    found = read_origin(origin, revision)
    if found.config.get("quantization_config"):
        message = "these weights are quantized already; start from the 16-bit model"
        raise RecipeError([Fault("config.json: quantization_config", message)])
    draft = _Draft(name=name, target=target, origin=found, shape=read_spec(found.config))
    draft, sizes, left_out = _fit_precision(draft, folders)
    texts = draft.texts(sizes)
    place(texts, folder)
    return NewRecipe(
        folder=folder, files=tuple(texts), sizes=sizes, left_out=left_out, source=found.source
    )


def _fit_precision(
    draft: _Draft, folders: ConfigFolders
) -> tuple[_Draft, dict[str, Fitted], dict[str, str]]:
    """The draft in the first precision that the card can have, the recipes' own first.

    The error is that of the first, where there is none.
    """
    refused: dict[str, RecipeError] = {}
    smaller = sorted(quant_specs().values(), key=lambda one: -one.linear_bytes(512, 512, 128))
    others = [one.name for one in smaller if one.name in folders.options("quantizer")]
    for quantizer in ("", *others[1:]):
        tried = replace(draft, quantizer=quantizer)
        try:
            sizes, left_out = tried.fit(folders)
        except RecipeError as error:
            refused[quantizer or others[0]] = error
        else:
            return tried, sizes, left_out | {name: str(why) for name, why in refused.items()}
    raise next(iter(refused.values()))


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A recipe whose sizes are not known yet; an empty `quantizer` is that of conf/build.yaml."""

    name: str
    target: str
    origin: Origin
    shape: ModelSpec
    quantizer: str = ""

    def fit(self, folders: ConfigFolders) -> tuple[dict[str, Fitted], dict[str, str]]:
        """Sizes of every compiler that can have some, and why others have none; one at least."""
        sizes: dict[str, Fitted] = {}
        refused: dict[str, RecipeError] = {}
        formats = sorted(
            format_specs().values(), key=lambda spec: _BOUND_FIRST.index(spec.bound_to)
        )
        for spec in formats:
            if (compiler := spec.name) not in folders.options("compiler"):
                continue
            smallest = _fit(spec, *_sizes_to_try(spec, self.shape)[-1], "bfloat16")
            with _stage(self.texts({compiler: smallest}), folders) as staged:
                recipe = load(self.name, [f"compiler={compiler}"], folders=staged).value
            try:
                sizes[compiler] = largest(recipe)
            except RecipeError as error:
                refused[compiler] = error
        if not sizes:
            raise next(iter(refused.values()))
        return sizes, {compiler: str(error) for compiler, error in refused.items()}

    def texts(self, sizes: Mapping[str, Fitted]) -> dict[Path, str]:
        """Path -> content of every file, the recipe last: what makes the others count."""
        files = {}
        for compiler, fitted in sizes.items():
            most = most_batch(format_spec(compiler))
            files[Path("sizes", self.name, f"{compiler}.yaml")] = (
                f"# The largest batch up to {most} that `enginesmith plan` accepts for "
                f"{self.target} here.\n" + _yaml(fitted.settings)
            )
        shape = {key: value for key, value in self.shape.config.items() if key not in IRRELEVANT}
        files[Path("shapes", f"{self.name}.yaml")] = f"# {self.origin.described}.\n" + _yaml(shape)
        files[Path(f"{self.name}.yaml")] = self.recipe_text(sizes)
        return files

    def recipe_text(self, sizes: Mapping[str, Fitted]) -> str:
        """`NAME.yaml`, for the first of the compilers."""
        batch = min(fitted.batch for fitted in sizes.values())
        context = min(fitted.context for fitted in sizes.values())
        source = self.origin.source
        command = f"enginesmith build {self.name}"
        if source.get("gated"):
            command += f" source.acknowledge_licence={source['licence']}  (once you have read it)"
        defaults = [
            "build",
            {"shapes@shape": self.name},
            {f"optional sizes/{self.name}@compiler": "${compiler}"},
            {"override source": self.origin.option},
            {"override target": self.target},
            *([{"override quantizer": self.quantizer}] if self.quantizer else []),
            {"override compiler": next(iter(sizes))},
            "_self_",
        ]
        keys = ("name", "batch", "isl", "osl", "min_share_of_ceiling")
        acceptance = {
            **({"window_tokens": context} if context < _WINDOW_TOKENS else {}),
            "targets": [{k: getattr(load, k) for k in keys} for load in targets(batch, context)],
        }
        # Hydra must take nothing in the values for an interpolation.
        escaped = {
            key: value.replace("${", "\\${") if isinstance(value, str) else value
            for key, value in source.items()
        }
        head = {"name": self.name, "version": "1.0.0", "source": escaped}
        parts = [_yaml({"defaults": defaults}, flow=False), _yaml(head, flow=False)]
        return f"# {command}\n" + "\n".join(parts) + _yaml({"acceptance": acceptance})


def _yaml(value: Mapping[str, Any], *, flow: bool | None = None) -> str:
    """A mapping as YAML; lists and mappings without others in them on one line each."""
    import yaml

    text: str = yaml.safe_dump(
        dict(value),
        default_flow_style=flow,
        sort_keys=False,
        width=100 if flow is None else 10_000,  # a notice is one line
        allow_unicode=True,
    )
    return text


@contextlib.contextmanager
def _stage(texts: Mapping[Path, str], folders: ConfigFolders) -> Iterator[ConfigFolders]:
    """The files in a private folder, and the search path that finds them there."""
    with tempfile.TemporaryDirectory(prefix="enginesmith-new-") as private:
        place(texts, Path(private))
        yield ConfigFolders(recipes=(Path(private), *folders.recipes), conf=folders.conf)


def place(texts: Mapping[Path, str], folder: Path) -> None:
    """Write new files below `folder` in order; if anything stops that, none of them is left."""
    made: list[Path] = []
    try:
        for path, text in texts.items():
            target = folder / path
            require_unshared(target, "--config-dir", team=True)
            for parent in reversed(target.parents):
                if not parent.is_dir():
                    parent.mkdir()
                    made.append(parent)
            with target.open("x", encoding="utf-8") as stream:
                made.append(target)
                stream.write(text)
    except BaseException as error:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        if isinstance(error, FileExistsError):
            message = f"{error.filename} exists, and is not overwritten; nothing was written"
            raise ConflictError(message) from error
        raise


def report(new: NewRecipe, config_dir: Path | None) -> Sequence[str]:
    """Lines for people: what was written, and the next two commands."""
    lines = ["Wrote"] + [f"  {new.folder / path}" for path in reversed(new.files)]
    for compiler, fitted in new.sizes.items():
        cache = fitted.settings.get("kv_cache_dtype", "static, 16-bit")
        size = f"batch {fitted.settings['max_batch_size']} x context {fitted.context}"
        lines.append(f"{compiler}: {size}, KV cache {cache}")
    lines += [f"{compiler} has no sizes: {why}" for compiler, why in new.left_out.items()]
    source = new.source
    if source.get("redistribution", "forbidden") == "forbidden":
        lines.append(
            f"licence: {source['licence']}, so no public registry takes its packages; state "
            "source.licence and source.redistribution in the recipe"
        )
    if source.get("gated"):
        lines.append(
            "gated: to publish, read the licence and set "
            f"source.acknowledge_licence={source['licence']}"
        )
    elsewhere = config_dir if config_dir is not None else new.folder
    searched = elsewhere.resolve() == Path("recipes").resolve()
    option = "" if searched else f" --config-dir {shlex.quote(str(elsewhere))}"
    name = new.files[-1].stem
    return [*lines, "Next", *(f"  enginesmith {word} {name}{option}" for word in ("plan", "build"))]
