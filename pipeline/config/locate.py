"""Where a key of the composed configuration was written: `recipes/phi3.yaml:12`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class ConfigFile:
    """A YAML file that takes part in a configuration.

    Attributes:
        path: The file.
        section: Dotted path of the section that it fills; empty for the whole.
    """

    path: Path
    section: str


def config_files(
    recipe: str, choices: Mapping[str, object], search: Sequence[Path]
) -> tuple[ConfigFile, ...]:
    """The files of a recipe, the strongest first: itself, those it starts from, then options.

    Args:
        recipe: Its name.
        choices: What Hydra chose: `group` or `group@section` -> option.
        search: Folders, as Hydra searches them.
    """
    found = list(_chain(recipe, "", search))
    # Sizes and shapes, which name their section, come after the option that they refine.
    for key, option in sorted(choices.items(), key=lambda choice: "@" not in choice[0]):
        group, _, section = key.partition("@")
        if isinstance(option, str) and not key.startswith("hydra/"):
            section = section.removeprefix("_global_.") or group.replace("/", ".")
            found += _chain(f"{group.lstrip('/')}/{option}", section, search)
    return tuple(found)


def locate(path: str, files: Sequence[ConfigFile]) -> str:
    """`FILE:LINE` of the strongest file that sets a key; empty where none does."""
    for file in files:
        inner = f"{path}.".removeprefix(f"{file.section}." if file.section else "")
        if file.section and inner == f"{path}.":
            continue
        node: yaml.Node | None = _node(file.path)
        line = None
        for part in inner.split(".")[:-1]:
            line, node = _child(node, part)
            if line is None:
                break
        if line is not None:
            shown = file.path
            if shown.is_relative_to(Path.cwd()):
                shown = shown.relative_to(Path.cwd())
            return f"{shown}:{line}"
    return ""


def _chain(name: str, section: str, search: Sequence[Path]) -> Iterator[ConfigFile]:
    """A file and those that its defaults list merges into the same section."""
    path = next((dir / f"{name}.yaml" for dir in search if (dir / f"{name}.yaml").is_file()), None)
    if path is None:
        return
    yield ConfigFile(path, section)
    _, defaults = _child(_node(path), "defaults")
    for entry in defaults.value if isinstance(defaults, yaml.SequenceNode) else ():
        if isinstance(entry, yaml.ScalarNode) and entry.value not in ("_self_", name):
            group, slash, _ = name.rpartition("/")
            yield from _chain(f"{group}{slash}{entry.value}", section, search)


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
