"""Where recipes and options lie: the user's own folders first, then what comes with the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.data import data_dir
from pipeline.core.errors import Fault, RecipeError


@dataclass(frozen=True, kw_only=True)
class ConfigFolders:
    """The search path of configuration.

    Attributes:
        recipes: Folders with recipes, and options as well; the first that has one wins.
        conf: Our base configuration and options.
    """

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
