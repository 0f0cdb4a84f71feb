"""A recipe and its overrides -> one Hydra configuration, with what could not be applied as faults.

Hydra stops at its first error, so what fails together is tried one by one. A misspelt key is set
here, and the validation of the whole refuses it.

A recipe may have sizes of its own for a compiler: `- optional sizes/phi3@compiler: ${compiler}` in
its defaults merges `sizes/phi3/<compiler>.yaml`, where there is one, over the compiler's option.
That option chooses the runner, unless `runner=` does.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from pipeline.core.errors import Fault, RecipeError
from pipeline.core.settings import data_dir

# A recipe is data: nothing in it, not even its list of defaults, can name a secret of this machine.
OmegaConf.clear_resolver("oc.env")

_COMPOSITION_ERRORS = (
    HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError, RecursionError,
    AssertionError,
)  # fmt: skip
"""What a bad file or override raises: Hydra lets PyYAML's and Python's own errors through, and
asserts that a group in a list of defaults is text."""

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
"""What Hydra can tell about a composition."""


ConfigFile = tuple[Path, str]
"""A YAML file, and the dotted path of the section that it fills; empty for the whole."""


def read_overrides(texts: Sequence[str]) -> tuple[list[Override], list[Fault]]:
    """Overrides in Hydra's grammar, the last one of each key, and what cannot be read."""
    parser = OverridesParser.create()
    found: dict[str, Override] = {}
    faults = []
    for text in texts:
        try:
            (override,) = parser.parse_overrides([text])
        except HydraException:
            override = None
        if override is None or not override.key_or_group:
            message = (
                f"cannot read the override {text!r}; write key=value, key=[a,b] for a list, "
                "or 'key=\"any text\"' in quotes"
            )
            faults.append(Fault("", message))
        elif override.is_sweep_override():
            message = (
                f"{text!r} names several values, and a run builds one: repeat the command for "
                "each, or write [a,b] for a list and 'a,b' in quotes for text"
            )
            faults.append(Fault(override.key_or_group, message))
        else:
            found[override.key_or_group] = override
    return list(found.values()), faults


def compose_recipe(
    recipe: str, overrides: Sequence[Override], folders: ConfigFolders
) -> tuple[DictConfig | None, list[Fault], list[ConfigFile]]:
    """The configuration, not yet resolved; the faults; its files, the strongest first."""
    recipe_dir = folders.recipe_dir(recipe) or folders.conf
    faults: list[Fault] = []
    groups: list[str] = []
    values: list[str] = []
    for override in overrides:
        key, line = override.key_or_group, str(override.input_line)
        section, _, name = key.rpartition(".")
        if override.is_hydra_override():
            faults.append(Fault(key, "Hydra itself is not configured here; leave it out"))
        elif (options := folders.options(key)) and not isinstance(override.value(), str):
            allowed = f"choose one of {', '.join(options)}, and set its values by {key}.KEY=VALUE"
            faults.append(Fault(key, f"got {line}; {allowed}"))
        elif options or override.package is not None:
            groups.append(line)
        elif name == "kind":
            faults.append(Fault(key, f"cannot be set; choose another option, {section}=OPTION"))
        else:  # pydantic knows which keys exist
            values.append(line if override.is_delete() else "++" + line.lstrip("+"))
    try:
        with warnings.catch_warnings(), initialize_config_dir(str(recipe_dir), version_base="1.3"):
            warnings.simplefilter("ignore", UserWarning)  # a defaults list without `_self_`
            search = _search_path(folders, recipe_dir)
            config, refused = _apply(recipe, search, [*groups, *values])
    except _COMPOSITION_ERRORS as error:
        return None, [*faults, _recipe_fault(recipe, error)], []
    choices = OmegaConf.to_container(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    files = _config_files(recipe, cast("dict[str, object]", choices), folders.search)
    return config, faults + refused, list(files)


def show_info(what: str, recipe: str, overrides: Sequence[str], folders: ConfigFolders) -> None:
    """Let Hydra print how it composes a recipe; a `RecipeError` where it cannot."""
    recipe_dir = folders.recipe_dir(recipe)
    if recipe_dir is None:
        raise RecipeError([folders.unknown(recipe)])
    try:
        with initialize_config_dir(str(recipe_dir), version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            hydra.show_info(what, recipe, [_search_path(folders, recipe_dir), *overrides])
    except _COMPOSITION_ERRORS as error:
        raise RecipeError([_recipe_fault(recipe, error)]) from error


def _search_path(folders: ConfigFolders, recipe_dir: Path) -> str:
    """Every folder but the recipe's own, which Hydra searches anyway, as a Hydra override."""
    others = [dir for dir in folders.search if dir != recipe_dir]
    quoted = ["'file://" + str(dir).replace("'", r"\'") + "'" for dir in others]
    return f"hydra.searchpath=[{','.join(quoted)}]"


def _apply(recipe: str, search: str, lines: Sequence[str]) -> tuple[DictConfig, list[Fault]]:
    """Compose with as many of `lines` as Hydra takes; a fault for each of the others."""

    def composed(*overrides: str) -> DictConfig:
        return compose(recipe, [search, *overrides], return_hydra_config=True)

    try:
        return composed(*lines), []
    except _COMPOSITION_ERRORS:
        if not lines:
            raise
    config = composed()
    taken: list[str] = []
    faults = []
    for line in lines:
        try:
            config = composed(*taken, line)
            taken.append(line)
        except _COMPOSITION_ERRORS as error:
            key = line.lstrip("+~").partition("=")[0]
            faults.append(Fault(key, _reason(error)))
    return config, faults


def _recipe_fault(recipe: str, error: Exception) -> Fault:
    """Why a recipe cannot be composed, whatever the overrides."""
    group = str(getattr(error, "missing_cfg_file", "") or "").rpartition("/")[0]
    return Fault(group, f"recipe {recipe} cannot be read: {_reason(error)}")


def _reason(error: Exception) -> str:
    """Hydra's message in one line, less the search path that it appends."""
    if isinstance(error, RecursionError):
        return "it contains itself"
    if isinstance(error, AssertionError):
        return "its list of defaults names an option that is no text"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        option = str(error.missing_cfg_file).rpartition("/")[2]
        return f"there is no option {option!r}; {suggestion(option, error.options)}"
    text = str(error)
    if not text or text.startswith("Error merging override"):
        text = str(error.__cause__ or error)
    text = text.partition("Config search path")[0]
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _config_files(
    recipe: str, choices: Mapping[str, object], search: Sequence[Path]
) -> Iterator[ConfigFile]:
    """The files of a recipe, the strongest first; `choices`: `group@section` -> option."""
    yield from _chain(recipe, "", search)
    # Sizes and shapes, which name their section, come after the option that they refine.
    for key, option in sorted(choices.items(), key=lambda choice: "@" not in choice[0]):
        group, _, section = key.partition("@")
        if isinstance(option, str) and not key.startswith("hydra/"):
            section = section.removeprefix("_global_.") or group.replace("/", ".")
            yield from _chain(f"{group.lstrip('/')}/{option}", section, search)


def _chain(name: str, section: str, search: Sequence[Path]) -> Iterator[ConfigFile]:
    """A file and those that its defaults list merges into the same section."""
    path = next((dir / f"{name}.yaml" for dir in search if (dir / f"{name}.yaml").is_file()), None)
    if path is None:
        return
    yield path, section
    _, defaults = _child(_node(path), "defaults")
    for entry in defaults.value if isinstance(defaults, yaml.SequenceNode) else ():
        if isinstance(entry, yaml.ScalarNode) and entry.value not in ("_self_", name):
            group, slash, _ = name.rpartition("/")
            yield from _chain(f"{group}{slash}{entry.value}", section, search)


def locate(path: str, files: Sequence[ConfigFile]) -> str:
    """`FILE:LINE` of the strongest file that sets a key; empty where none does."""
    for file, section in files:
        inner = f"{path}.".removeprefix(f"{section}." if section else "")
        if section and inner == f"{path}.":
            continue
        node = _node(file)
        line = None
        for part in inner.split(".")[:-1]:
            line, node = _child(node, part)
            if line is None:
                break
        if line is not None:
            here = file.is_relative_to(Path.cwd())
            return f"{file.relative_to(Path.cwd()) if here else file}:{line}"
    return ""


def _node(path: Path) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return node


def _child(node: yaml.Node | None, key: str) -> tuple[int | None, yaml.Node | None]:
    """The line of a key or list item, from 1, and what it holds."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == key:
                return name.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and key.isdecimal() and int(key) < len(node.value):
        item = node.value[int(key)]
        return item.start_mark.line + 1, item
    return None, None


@dataclass(frozen=True, kw_only=True)
class ConfigFolders:
    """The search path: `recipes` may hold options, too, and the first that has one wins."""

    recipes: tuple[Path, ...]
    conf: Path

    @property
    def search(self) -> tuple[Path, ...]:
        return (*self.recipes, self.conf)

    def recipe_names(self) -> tuple[str, ...]:
        return _stems(self.recipes)

    def recipe_dir(self, recipe: str) -> Path | None:
        if recipe not in self.recipe_names():
            return None
        return next(dir for dir in self.recipes if (dir / f"{recipe}.yaml").is_file())

    def unknown(self, recipe: str) -> Fault:
        hint = suggestion(recipe, self.recipe_names())
        return Fault("", f"there is no recipe {recipe!r}; {hint}")

    def options(self, group: str) -> tuple[str, ...]:
        return _stems([dir / group for dir in self.search])


def _stems(folders: Iterable[Path]) -> tuple[str, ...]:
    files = (path for folder in folders for path in folder.glob("*.yaml") if path.is_file())
    return tuple(sorted({path.stem for path in files}))


def config_folders(config_dir: Path | None) -> ConfigFolders:
    """The user's `--config-dir`, `./recipes`, then ours."""
    if config_dir is not None and not config_dir.is_dir():
        raise RecipeError([Fault("--config-dir", f"{config_dir} is not a folder")])
    wanted = [config_dir, Path("recipes"), data_dir("recipes")]
    present = [dir.resolve() for dir in wanted if dir is not None and dir.is_dir()]
    return ConfigFolders(recipes=tuple(dict.fromkeys(present)), conf=data_dir("conf"))


def closest(name: str, options: Iterable[str]) -> str | None:
    """The option most like `name`, upper and lower case alike; None if none is similar."""
    by_lower = {option.lower(): option for option in options}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[found[0]] if found else None


def suggestion(name: str, options: Iterable[str]) -> str:
    """What to write instead of `name`: `did you mean a? allowed: a, b, c`."""
    allowed = sorted(set(options))
    match = closest(name, allowed)
    return (f"did you mean {match}? " if match else "") + f"allowed: {', '.join(allowed) or 'none'}"
