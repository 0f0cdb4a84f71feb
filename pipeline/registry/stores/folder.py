"""A registry in a folder as a recipe names it: of this machine, or on a network file system."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pydantic.dataclasses

from pipeline.core.settings import STRICT, PathField
from pipeline.registry.stores.folder_reading import FolderObjects
from pipeline.registry.stores.tree import TreeStore

if TYPE_CHECKING:
    from pipeline.registry.stores.publication import WritableStore


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class FolderRegistry:
    """A registry in a folder, as a recipe names it; made when something is published."""

    path: PathField

    def reader(self) -> TreeStore:
        return TreeStore(objects=FolderObjects(path=self.path), local=True)

    def store(self) -> WritableStore:
        from pipeline.registry.stores.folder_writing import WritableFolder
        from pipeline.registry.stores.publication import WritableTree

        return WritableTree(objects=WritableFolder(path=self.path), local=True)


KIND = FolderRegistry
