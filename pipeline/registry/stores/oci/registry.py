"""An OCI registry as a recipe names it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pydantic.dataclasses

from pipeline.core.settings import STRICT
from pipeline.registry.stores.oci.address import parse_address
from pipeline.registry.stores.oci.transport import Transport

if TYPE_CHECKING:
    from pipeline.registry.store import Store
    from pipeline.registry.stores.publication import WritableStore


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class OciRegistry:
    """A registry that speaks the OCI distribution API, as a recipe names it."""

    url: str  # `oci://HOST[:PORT]/PREFIX`; the repository of a recipe is `PREFIX/<name>`
    public: bool = False  # whether anyone can read it

    def __post_init__(self) -> None:
        parse_address(self.url)

    def reader(self) -> Store:
        from pipeline.registry.stores.oci.reading import OciStore

        return OciStore(**self._settings())

    def store(self) -> WritableStore:
        from pipeline.registry.stores.oci.writing import WritableOciStore

        return WritableOciStore(**self._settings())

    def _settings(self) -> dict[str, Any]:
        address = parse_address(self.url)
        transport = Transport(address.api, address.host)
        return {**vars(self), "address": address, "transport": transport}


KIND = OciRegistry
