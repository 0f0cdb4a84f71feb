"""Remove versions in two steps, and what interrupted runs left behind.

A removal takes the manifest, and with it the version. Its files stay for those who read them, under
a fresh lease; `leftovers` takes what has no manifest a day after the newest object of it, which is
that lease. A publication holds a lease, too, so gc never takes files that are being published.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.registry.store import Place
from pipeline.registry.stores.layout import (
    LEASE,
    lease_key,
    manifest_key,
    parse_key,
    statements_key,
    version_key,
)
from pipeline.registry.stores.objects import Found, Objects


@dataclass(kw_only=True)
class _Version:
    """The objects of one version.

    Attributes:
        published: Its manifest is there.
        lease: Of a publication or a removal.
        count: How many objects there are.
        size_bytes: All of them.
        newest_s: When the newest one was written.
    """

    published: bool = False
    lease: Found | None = None
    count: int = 0
    size_bytes: int = 0
    newest_s: float = 0.0


def delete_package(objects: Objects, place: Place) -> int:
    """See `pipeline.registry.store.WritableStore.delete_package`."""
    manifest = manifest_key(place)
    if objects.find(manifest) is None:
        return 0
    freed = sum(found.size_bytes for found in objects.listed(f"{version_key(place)}/"))
    objects.replace(lease_key(place), b"removed")
    objects.delete([manifest])
    return freed


def leftovers(objects: Objects, min_age_s: float, *, delete: bool) -> list[str]:
    """See `pipeline.registry.store.WritableStore.leftovers`."""
    newest_s = objects.now_s() - min_age_s
    words = list(objects.unfinished(min_age_s, delete=delete))
    versions: dict[Place, _Version] = {}
    for found in objects.listed(""):
        if (parsed := parse_key(found.key)) is not None:
            place, rest = parsed
            version = versions.setdefault(place, _Version())
            version.published |= found.key == manifest_key(place)
            version.lease = found if rest == LEASE else version.lease
            version.count += 1
            version.size_bytes += found.size_bytes
            version.newest_s = max(version.newest_s, found.modified_s)
    for place, version in sorted(versions.items()):
        if version.published and version.lease and version.lease.modified_s <= newest_s:
            words.append(f"{place} (lease of a publication that is over)")
            if delete:
                objects.delete([lease_key(place)])
        elif not version.published and version.newest_s <= newest_s:
            words.append(
                f"{place} ({version.count} files without a manifest, {version.size_bytes} bytes)"
            )
            if delete:
                _remove(objects, place, newest_s)
    return words


def _remove(objects: Objects, place: Place, newest_s: float) -> None:
    """Remove all objects of a version, unless a publisher has come meanwhile; the lease last."""
    keys = []
    for prefix in (f"{version_key(place)}/", statements_key(place)):
        for found in objects.listed(prefix):
            if found.modified_s > newest_s or found.key == manifest_key(place):
                return
            keys.append(found.key)
    lease = objects.find(lease_key(place))
    if lease is None or lease.modified_s <= newest_s:
        objects.delete(keys)
        objects.delete([lease_key(place)])
